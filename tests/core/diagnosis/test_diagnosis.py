"""The doctor: scores and checks on made-up pairs, sound or with one fault, and its findings."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from byte_tokens import TEMPLATE
from fake_models import DEPTHS, FakeBackend

from treeflash import diagnosis
from treeflash.decoding.interfaces import DeviceReport
from treeflash.diagnosis import (
    Diagnosis,
    Gain,
    Trial,
    check_device,
    check_exact_mode,
    check_images,
    check_keys,
    check_precision,
    depth_means,
    diagnose,
    findings,
    mask_candidates,
    measure,
    write_changed,
)
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.drafters.loading import drafter_config
from treeflash.errors import CheckpointError, NumericalError, PromptError
from treeflash.hub.published import DEEPSPEC_SYSTEM
from treeflash.testing.models import edit_config, write_dialect, write_drafter, write_target
from treeflash.text.prompt import Prompting

pytestmark = pytest.mark.usefixtures("quick_collections")

VOCAB = 259  # of the byte tokenizer
COMMON = 42
PROMPTS = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]


def token_at(position):
    """The target's token at a position, after any prefix."""
    return 3 + position * 7 % 200


def rows_at(start, depths=DEPTHS, share=0.7):
    """A block's log probabilities: `share` more for the true token, beyond `depths` for COMMON."""
    rows = np.full((DEPTHS, VOCAB), 0.3 / VOCAB)
    for depth in range(1, DEPTHS + 1):
        rows[depth - 1, token_at(start + depth) if depth <= depths else COMMON] += share
    return np.log(rows).astype(np.float32)


@dataclass
class Head:
    """A head that knows the true tokens of some depths, and records the previous tokens."""

    depths: int = DEPTHS

    def log_probs(self, block, previous):
        self.previous = previous
        return rows_at(len(block), self.depths)


@dataclass
class Training:
    """What a drafter was trained on, and with; None is for anything."""

    layers: tuple[int, ...] = (1, 2)
    mask: int = 2
    causal: bool | None = None
    scale: float | None = None
    prompts: tuple[list[int], ...] | None = None
    late: int = 0  # depths that each row is late by
    depths: int = DEPTHS

    def fits(self, config, tokens):
        prompts = [] if self.prompts is None else self.prompts
        texts = ([*x, *map(token_at, range(len(x), len(tokens)))] for x in prompts)
        return (
            (config.target_layer_ids, config.mask_token_id) == (self.layers, self.mask)
            and self.causal in (None, config.causal[0])
            and self.scale in (None, config.input_scale)
            and (self.prompts is None or tokens in texts)
        )


class MadeUp(FakeBackend):
    """A pair with a folder's configuration, whose drafter knows the tokens if it fits."""

    inexact, images = "rounding may differ", "it is made up"

    def __init__(self, folder, head=None, **training):
        super().__init__(lambda tokens: np.eye(VOCAB)[token_at(len(tokens))], None, VOCAB)
        self.drafter_config, self.training = drafter_config(folder), Training(**training)
        if max(self.drafter_config.target_layer_ids) > 2:
            raise CheckpointError("the target has no such layer")
        self.drafter, self.head = self, head

    def draft(self, roots, depths=None):
        ((state, root),) = roots
        assert root == token_at(state.length)
        return [list(state.tokens)]

    def log_probs(self, block):
        share = 0.7 if self.training.fits(self.drafter_config, block) else 0.2
        return rows_at(len(block) - self.training.late, self.training.depths, share)


@pytest.fixture
def problems(folder, byte_tokenizer):
    """The problems of a made-up pair, by check."""

    def problems(prompting=Prompting(), folder=folder, target=None, **made_for):  # noqa: B008
        diagnosis = diagnose(
            lambda folder: MadeUp(folder, **made_for),
            folder,
            byte_tokenizer,
            PROMPTS,
            prompting=prompting,
            max_tokens=20,
            target_config=target,
        )
        found = {f.check: f.message for f in diagnosis.findings if not f.ok}
        assert diagnosis.ok == (not found)
        return found

    return problems


GEMMA = {"model_type": "gemma4_text"}
"""A target that scales its embeddings, so that the drafter's scale is in doubt."""
SOUND = [{}, {"head": Head()}, {"layers": (2, 3)}, {"scale": 1.0, "target": GEMMA}]
SOUND += [{"scale": 32**0.5, "target": {"model_type": "qwen3"}}]
MASK = "mask_token_id 1 (<|end|>): the target's tokens are 3."
SCALE = {"scale": 32**0.5, "target": GEMMA}
SLOT = "row i of the block taken for depth {}: the"
FAULTS = [
    ({"layers": (0, 1)}, "target layers", "target_layer_ids [0, 1]: the target's tokens are 3."),
    (SCALE, "embedding scale", "input_embedding_scale 5.65685: the target's"),
    ({"mask": 1}, "mask token", MASK),
    ({"late": -1}, "block offset", SLOT.format("i + 1")),
    ({"late": 1}, "block offset", SLOT.format("i - 1")),
    ({"depths": 3}, "depths", "the drafter's agreement falls from 100% at depth 3 to 0% at "),
    ({"head": Head(depths=2)}, "depths", "the AR head's agreement falls from 100% at depth 2 to "),
    ({"depths": 0}, "depths", "the drafter's top token at depth 1 matches the target in 0% of "),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize("made_for", SOUND)
def test_a_sound_pair(problems, made_for):
    """Layers that the target lacks are not tried."""
    assert problems(**made_for) == {}


@pytest.mark.parametrize(("made_for", "check", "says"), FAULTS)
def test_a_pair_with_one_fault(problems, made_for, check, says):
    found = problems(**made_for)
    assert found[check].startswith(says)
    assert found.keys() == {check, "depths"} if "late" in made_for else {check}


@pytest.mark.parametrize(
    ("texts", "deeper", "problem"),
    [
        ([0, 1, 2, 3] * 5, 0.0, True),
        ([0, 1] * 10, 0.0, False),  # too few texts to tell
        ([0, 1, 2, 3] * 5, 0.2, False),  # what comes later is no end
    ],
)
def test_a_collapse_is_told_by_several_texts_and_at_all_later_depths(texts, deeper, problem):
    hits = np.zeros((20, 4))
    hits[:, 0] = 1
    hits[: round(20 * deeper), 3] = 1
    scores = diagnosis.TokenScores(log_probs=np.where(hits > 0, -0.1, -9.0), hits=hits)
    found = diagnosis.check_depths(
        diagnosis.DrafterScores(scores, scores, scores, texts=np.array(texts))
    )
    assert found.ok != problem


@pytest.fixture
def sliding(folder, tmp_path):
    """The folder of a drafter whose first layer has a window."""
    write_changed(folder, tmp_path, {})
    layers = ["sliding_attention", "full_attention"]
    edit_config(tmp_path, lambda c: c.update(layer_types=layers, sliding_window=4))
    return tmp_path


def test_causal_block(problems, sliding):
    assert problems(folder=sliding, causal=True) == {}
    found = problems(folder=sliding, causal=False)
    assert found.keys() == {"causal block"}
    assert found["causal block"].startswith("is_causal False: the target's tokens are 3.")


def test_a_quantised_target_is_pointed_out():
    (finding,) = check_precision({"quantization": {"bits": 4}})
    assert finding.ok
    assert "the target is quantised" in finding.message
    assert check_precision({"quantization_config": None}) == []


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("asked", "made_for", "way"),
    [
        ({}, {"thinking": True}, "with the chat template, thinking on: the target's"),
        ({"thinking": True}, {}, "with the chat template, thinking off: the target's"),
        ({}, {"system": DEEPSPEC_SYSTEM}, "with the chat template, thinking off, the system mess"),
        ({}, {"raw": True}, "without the chat template: the target's"),
        ({"raw": True}, {}, "with the chat template, thinking off: the target's"),
    ],
)
def test_prompting(problems, byte_tokenizer, asked, made_for, way):
    prompts = tuple(Prompting(**made_for).encode(byte_tokenizer, prompt) for prompt in PROMPTS)
    found = problems(Prompting(**asked), prompts=prompts)
    assert found.keys() == {"prompting"}
    assert found["prompting"].startswith(way)


def test_a_template_without_a_system_message(problems, byte_tokenizer, monkeypatch):
    made_for = Prompting(system=DEEPSPEC_SYSTEM)
    prompts = tuple(made_for.encode(byte_tokenizer, prompt) for prompt in PROMPTS)
    refusal = "{{ raise_exception('no system message') if messages[0].role == 'system' }}"
    monkeypatch.setattr(byte_tokenizer.transformers, "chat_template", refusal + TEMPLATE)
    assert problems(prompts=prompts) == {}


def test_mask_candidates(byte_tokenizer):
    assert byte_tokenizer.size == VOCAB
    names = {0: "<|start|>", 1: "<|end|>", 2: "<|stop|>"}
    assert mask_candidates(byte_tokenizer, 1, VOCAB) == {0: names[0], 2: names[2]}
    assert list(mask_candidates(byte_tokenizer, 1, VOCAB + 1)) == [VOCAB, 0, 2]
    assert list(mask_candidates(byte_tokenizer, 1, VOCAB + 1, 2)) == [VOCAB, 0]


# Two diagnoses, one of them long; `test_a_pair_with_one_fault` has the check.
@pytest.mark.nightly
def test_a_thorough_diagnosis_tries_more_mask_tokens(folder, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(diagnosis, "MASK_CANDIDATES", 1)

    def checks(**settings):
        found = []
        diagnose(
            lambda folder: MadeUp(folder),
            folder,
            byte_tokenizer,
            PROMPTS,
            prompting=Prompting(),
            max_tokens=20,
            report=lambda number, total, check: found.append(check),
            **settings,
        )
        return found.count("mask token")

    assert (checks(), checks(thorough=True)) == (1, 2)


def test_changed_folder(folder, tmp_path):
    write_changed(folder, tmp_path, {"mask_token_id": 9})
    assert drafter_config(tmp_path).mask_token_id == 9
    assert drafter_config(tmp_path).target_layer_ids == (1, 2)
    assert drafter_config(folder).mask_token_id == 2
    assert read_tensors(tmp_path).keys() == read_tensors(folder).keys()


def test_changed_settings_of_speculators_are_written_in_their_format(tmp_path):
    write_target(tmp_path / "target", "qwen3", seed=0)
    write_dialect(tmp_path / "drafter", tmp_path / "target", "speculators-dspark", seed=1)
    (tmp_path / "changed").mkdir()
    settings = {"target_layer_ids": [1, 3], "mask_token_id": 5}
    write_changed(tmp_path / "drafter", tmp_path / "changed", settings)
    changed = drafter_config(tmp_path / "changed")
    assert changed.target_layer_ids == (1, 3)
    assert changed.mask_token_id == 5


def test_keys_that_are_ignored_are_listed(tmp_path):
    write_target(tmp_path / "target", "qwen3", seed=0)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=1)
    assert check_keys(read_config(tmp_path / "drafter")) == []
    edit_config(tmp_path / "drafter", lambda c: c.update(mrope_section=[1, 2]))
    edit_config(tmp_path / "drafter", lambda c: c["dflash_config"].update(novelty=1))
    (finding,) = check_keys(read_config(tmp_path / "drafter"))
    assert finding.ok
    assert finding.message.endswith("were ignored: dflash_config.novelty, mrope_section")


def trial(nats, least=0.1, error=0.0):
    gains = {"changed": None if nats is None else Gain(nats, error)}
    return Trial(check="it", gains=gains, least=least)


@pytest.mark.parametrize(
    ("trials", "ok"),
    [
        ([trial(0.2), trial(0.05), trial(None)], [False, True, True]),
        ([trial(0.2), trial(0.4), trial(0.5)], [True, False, False]),  # by accident, the first
        ([trial(0.2), trial(0.5, least=0.6)], [False, True]),
    ],
)
def test_judging(trials, ok):
    assert [finding.ok for finding in findings(trials)] == ok


def test_messages_of_trials():
    trials = [trial(0.2), trial(0.05), trial(1.58, error=0.6), trial(-0.1, error=0.1), trial(None)]
    assert [findings([each])[0].message for each in trials] == [
        "changed: the target's tokens are 1.22x as probable",
        "no significant improvement (best alternative: changed, 1.05x)",
        "no significant improvement (best alternative: changed, 4.85x, within noise)",
        "no significant improvement (best alternative: changed, 0.90x)",
        "no alternative to try",
    ]


class Machine:
    """A backend on a machine with some free memory, whose KV cache takes 1 MiB for a position."""

    drafter_config, max_positions = None, 10_000

    def __init__(self, free_gb, **settings):
        weights, available = 3 << 30, int((free_gb + 3) * (1 << 30) / 0.9) + 1
        self.report = DeviceReport(available_bytes=available, weights_bytes=weights, **settings)

    def device_report(self):
        return self.report

    def state_nbytes(self, capacity, *, drafts):
        return capacity << 20


@pytest.mark.parametrize(
    ("free_gb", "ok", "says"),
    [
        (11, True, "leave 11.0 GiB, enough for a context of 10000 tokens (10.8 GiB)"),
        (6, True, "leave 6.0 GiB, enough for a context of 5120 of 10000 tokens"),
        (0.5, False, "the models take 3.0 GiB and leave 512.0 MiB, enough"),
        (2, False, "enough for a context of 1024 of 10000 tokens; use a smaller model"),
        (-1, False, "leave 0 bytes, enough for a context of 0 of 10000 tokens"),
    ],
)
def test_whether_a_context_fits(free_gb, ok, says):
    (finding,) = check_device(Machine(free_gb))
    assert (finding.check, finding.ok) == ("memory", ok)
    assert says in finding.message


def test_facts_about_the_machine_and_batches_are_told():
    facts = {"chip": "Apple M4", "GPU cores": "10"}
    device, _, batches = check_device(Machine(20, facts=facts, batches=False))
    assert device.message == "chip: Apple M4, GPU cores: 10"
    assert (batches.check, batches.ok) == ("batches", True)
    assert check_device(object()) == []


def test_kernels_that_are_used_and_that_are_not_are_told():
    """A line for each, in the JSON too."""
    verdicts = {"5 rows": "not used, 1.10 times as fast", "9 rows": "used, 1.60 times as fast"}
    kernels = {"products": verdicts, "attention": {"64 columns": "not used, no such type"}}
    _, *findings = check_device(Machine(20, kernels=kernels))
    assert [(finding.check, finding.ok) for finding in findings] == [("kernel", True)] * 2
    assert [finding.message for finding in findings] == [
        "products: 5 rows not used, 1.10 times as fast; 9 rows used, 1.60 times as fast",
        "attention: 64 columns not used, no such type",
    ]
    diagnosis = Diagnosis(marginal=[], corrected=None, findings=findings)
    assert diagnosis.to_dict()["findings"][1]["message"] == findings[1].message


def test_images_are_reported(byte_tokenizer):
    pytest.importorskip("PIL")
    from stub_images import FEATURES, StubProcessor

    refused = check_images(SimpleNamespace(images="it has no vision tower"))
    assert refused.ok
    assert refused.message == "prompts with images are refused: it has no vision tower"
    taken = check_images(SimpleNamespace(images=StubProcessor(byte_tokenizer)))
    assert taken.message == f"taken; one of 512 x 512 pixels is {FEATURES} tokens"


@pytest.mark.parametrize(("inexact", "start"), [(None, "exact"), ("near-ties may differ", "near")])
def test_exact_mode_is_reported(inexact, start):
    finding = check_exact_mode(SimpleNamespace(inexact=inexact))
    assert finding.ok
    assert finding.message.startswith(start)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a drafter; its target's folder is beside it."""
    folder = tmp_path_factory.mktemp("pair")
    write_target(folder / "target", "llama", seed=0, vocab_size=VOCAB)
    write_drafter(folder / "drafter", folder / "target", seed=1, target_layer_ids=(1, 2))
    edit_config(folder / "drafter", lambda c: c["dflash_config"].update(mask_token_id=2))
    return folder / "drafter"


def test_measure(folder):
    """Three blocks of one text: every fourth token is a root; the last has no token after it."""
    pair = MadeUp(folder, head=Head())
    answer = [token_at(position) for position in range(2, 12)]
    answer[4] = COMMON  # at depth 4 of the first block, the root of the second
    pair.draft = lambda roots, depths=None: [list(text.tokens) for text, _ in roots]
    found = measure(pair, [([5], answer[:1]), ([5, 6], answer)], pair.head)
    np.testing.assert_array_equal(
        found.marginal.hits, [[1, 1, 1, 0, 1], [1, 1, 1, 1, 1], [1, np.nan, np.nan, np.nan, np.nan]]
    )
    assert found.marginal.log_probs[0, 0] == pytest.approx(math.log(0.7 + 0.3 / VOCAB))
    assert found.marginal.log_probs[0, 3] == pytest.approx(math.log(0.3 / VOCAB))
    assert found.earlier.hits[:, 0].tolist() == [0, 0, 0]
    assert np.isnan(found.later.hits[2]).all()
    assert found.later.hits[0].tolist() == [0, 0, 0, 0, 0]
    np.testing.assert_array_equal(pair.head.previous[:2], answer[8:])
    assert found.texts.tolist() == [1, 1, 1]
    by_text = found.text_means(2)
    assert np.isnan(by_text[0])
    assert by_text[1] == np.nanmean(found.marginal.log_probs)
    assert depth_means(found.marginal.hits) == [1, 1, 1, 0.5, 1]


def test_answers_too_short(folder):
    with pytest.raises(PromptError, match="too short to score"):
        measure(MadeUp(folder), [([5], [7])])


def test_a_drafter_that_is_not_a_number(folder):
    pair = MadeUp(folder)
    pair.log_probs = lambda block: np.full((DEPTHS, VOCAB), np.nan, np.float32)
    with pytest.raises(NumericalError, match="not a number"):
        measure(pair, [([5], [token_at(1), token_at(2)])])


def test_gain():
    base = np.array([[-1.0, -2.0], [-3.0, np.nan], [np.nan, np.nan]])
    gain = Gain.between(base, base + np.array([[0.5, 1.5], [3.0, 0.0], [9.0, 9.0]]))
    assert gain.nats == 2
    assert gain.error == 1
    assert str(gain) == "7.39x"
    assert not gain.is_clear(0.1)  # fewer than three standard errors
    assert Gain(2.0, 0.6).is_clear(2.0)
    assert not Gain(2.0, 0.6).is_clear(2.1)
    assert not Gain.between(base[:1], base[:1] + 5).is_clear(0.1)  # one block proves nothing
