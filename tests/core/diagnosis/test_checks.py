"""Each check on a pair that is made up: sound, or with one fault."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from treeflash.decoding.choices import Chosen
from treeflash.decoding.interfaces import Extension
from treeflash.diagnosis.checks import (
    check_keys,
    check_precision,
    diagnose,
    mask_candidates,
    write_changed,
)
from treeflash.diagnosis.finding import Trial, judge
from treeflash.diagnosis.scores import Gain, Text, by_depth, measure
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.drafters.formats import drafter_config
from treeflash.errors import CheckpointError, NumericalError, PromptError
from treeflash.hub.published import DEEPSPEC_SYSTEM
from treeflash.testing.dialects import write_dialect
from treeflash.testing.models import edit_config, write_drafter, write_target
from treeflash.text.chat import Prompting

VOCAB = 259  # of the byte tokenizer
DEPTHS = 5
COMMON = 42
PROMPTS = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]


def token_at(position):
    """What the target says there, whatever came before."""
    return 3 + position * 7 % 200


def rows_at(start, depths=DEPTHS, share=0.7):
    """A block's log probabilities: so much for the true token at some depths, else for COMMON."""
    rows = np.full((DEPTHS, VOCAB), 0.3 / VOCAB)
    for depth in range(1, DEPTHS + 1):
        rows[depth - 1, token_at(start + depth) if depth <= depths else COMMON] += share
    return np.log(rows).astype(np.float32)


@dataclass
class Head:
    """A head that drafts at some depths, and notes what it was given."""

    depths: int = DEPTHS

    def log_probs(self, block, previous):
        self.previous = previous
        return rows_at(block, self.depths)


@dataclass
class MadeUpText:
    """Its length is all that the pair knows of it."""

    length: int = 0
    nbytes: int = 0

    def close(self):
        pass


@dataclass
class MadeUp:
    """A pair as its folder says; the other fields say what the drafter was made for."""

    folder: Path
    layers: tuple[int, ...] = (1, 2)
    mask: int = 2
    causal: bool | None = None
    scale: float | None = None
    prompts: tuple[list[int], ...] | None = None
    late: int = 0  # depths that each row is late by
    depths: int = DEPTHS
    head: Head | None = None
    vocab_size: int = VOCAB
    max_positions: int = 1000

    def __post_init__(self):
        self.drafter_config = drafter_config(self.folder)
        if max(self.drafter_config.target_layer_ids) > 2:
            raise CheckpointError("the target has no such layer")

        self.verifier = self.drafter = self

    def open(self, capacity, *, drafts):
        return MadeUpText()

    def state_nbytes(self, capacity, *, drafts):
        return 0

    def run(self, work):
        return [self.extend(x) if isinstance(x, Extension) else self.verify(x) for x in work]

    def extend(self, work):
        text = work.state
        self.prompt = self.prompt if text.length else list(work.token_ids)
        text.length += len(work.token_ids)
        return Chosen(np.array([token_at(text.length)], np.int32))

    def verify(self, work):
        return Chosen(np.array([token_at(work.state.length + 1)], np.int32))

    def commit(self, paths):
        for text, path in paths:
            text.length += len(path)

    def draft(self, roots, depths=None):
        ((text, root),) = roots
        assert root == token_at(text.length)
        return [text.length]

    def log_probs(self, block):
        fits = (
            self.drafter_config.target_layer_ids == self.layers
            and self.drafter_config.mask_token_id == self.mask
            and self.causal in (None, self.drafter_config.causal[0])
            and self.scale in (None, self.drafter_config.input_scale)
            and (self.prompts is None or self.prompt in self.prompts)
        )
        return rows_at(block - self.late, self.depths, 0.7 if fits else 0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    write_target(folder / "target", "llama", seed=0, vocab_size=VOCAB)
    write_drafter(folder / "drafter", folder / "target", seed=1, target_layer_ids=(1, 2))
    edit_config(folder / "drafter", lambda c: c["dflash_config"].update(mask_token_id=2))
    return folder / "drafter"


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


@pytest.mark.parametrize("head", [None, Head()])
def test_a_sound_pair(problems, head):
    assert problems(head=head) == {}


def test_layers_off_by_one(problems):
    found = problems(layers=(0, 1))
    assert found.keys() == {"target layers"}
    assert found["target layers"].startswith("target_layer_ids [0, 1]: the target's tokens are 3.")


def test_layers_that_the_target_lacks_are_not_tried(problems):
    assert problems(layers=(2, 3)) == {}


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


def test_embedding_scale(problems):
    """It is in doubt for targets that scale their embeddings."""
    gemma = {"model_type": "gemma4_text"}
    assert problems(scale=1.0, target=gemma) == {}
    found = problems(scale=32**0.5, target=gemma)
    assert found.keys() == {"embedding scale"}
    assert found["embedding scale"].startswith("input_embedding_scale 5.65685: the target's")
    assert problems(scale=32**0.5, target={"model_type": "qwen3"}) == {}


def test_a_quantised_target_is_pointed_out():
    (finding,) = check_precision({"quantization": {"bits": 4}})
    assert finding.ok
    assert "the target is quantised" in finding.message
    assert check_precision({"quantization_config": None}) == []


def test_mask_token(problems):
    found = problems(mask=1)
    assert found.keys() == {"mask token"}
    assert found["mask token"].startswith("mask_token_id 1 (<|end|>): the target's tokens are 3.")


@pytest.mark.parametrize(("late", "depth"), [(-1, "i + 1"), (1, "i - 1")])
def test_block_offset(problems, late, depth):
    found = problems(late=late)
    assert found["block offset"].startswith(f"row i of the block taken for depth {depth}: the")
    assert found.keys() == {"block offset", "depths"}  # nothing is right at depth 1


@pytest.mark.parametrize(
    ("asked", "made_for", "advice"),
    [
        (
            Prompting(),
            Prompting(thinking=True),
            "with the chat template, thinking on: the target's",
        ),
        (
            Prompting(thinking=True),
            Prompting(),
            "with the chat template, thinking off: the target's",
        ),
        (
            Prompting(),
            Prompting(system=DEEPSPEC_SYSTEM),
            "with the chat template, thinking off, the system message 'You are a helpful assist",
        ),
        (Prompting(), Prompting(raw=True), "without the chat template: the target's"),
        (Prompting(raw=True), Prompting(), "with the chat template, thinking off: the target's"),
    ],
)
def test_prompting(problems, byte_tokenizer, asked, made_for, advice):
    prompts = tuple(made_for.encode(byte_tokenizer, prompt) for prompt in PROMPTS)
    found = problems(asked, prompts=prompts)
    assert found.keys() == {"prompting"}
    assert found["prompting"].startswith(advice)


def test_depths_that_collapse(problems):
    found = problems(depths=3)
    assert found.keys() == {"depths"}
    assert (
        "falls from 100% at depth 3 to 0% at depth 4; if the drafter was trained with block_size 4"
        in found["depths"]
    )


def test_depths_of_the_head_that_collapse(problems):
    found = problems(head=Head(depths=2))
    assert found.keys() == {"depths"}
    assert "the AR head's agreement falls from 100% at depth 2 to 0% at depth 3" in found["depths"]


def test_a_drafter_for_another_target(problems):
    found = problems(depths=0)
    assert found.keys() == {"depths"}
    assert "at depth 1 matches the target in 0% of cases, no better than chance" in found["depths"]


def test_measure(folder):
    """Three blocks of one text: every fourth token is a root; the last has no token after it."""
    pair = MadeUp(folder, head=Head())
    answer = [token_at(position) for position in range(2, 12)]
    answer[4] = COMMON  # at depth 4 of the first block, the root of the second
    pair.draft = lambda roots, depths=None: [text.length for text, _ in roots]
    found = measure(pair, [Text([5], answer[:1]), Text([5, 6], answer)], pair.head)
    np.testing.assert_array_equal(
        found.marginal.hits,
        [[1, 1, 1, 0, 1], [1, 1, 1, 1, 1], [1, np.nan, np.nan, np.nan, np.nan]],
    )
    assert found.marginal.log_probs[0, 0] == pytest.approx(math.log(0.7 + 0.3 / VOCAB))
    assert found.marginal.log_probs[0, 3] == pytest.approx(math.log(0.3 / VOCAB))
    assert found.earlier.hits[:, 0].tolist() == [0, 0, 0]
    assert np.isnan(found.later.hits[2]).all()
    assert found.later.hits[0].tolist() == [0, 0, 0, 0, 0]
    np.testing.assert_array_equal(pair.head.previous[:2], answer[8:])
    assert found.texts.tolist() == [1, 1, 1]
    by_text = found.by_text(2)
    assert np.isnan(by_text[0])
    assert by_text[1] == np.nanmean(found.marginal.log_probs)
    assert by_depth(found.marginal.hits) == [1, 1, 1, 0.5, 1]


def test_answers_too_short(folder):
    with pytest.raises(PromptError, match="too short to score"):
        measure(MadeUp(folder), [Text([5], [7])])


def test_a_drafter_that_is_not_a_number(folder):
    pair = MadeUp(folder)
    pair.log_probs = lambda block: np.full((DEPTHS, VOCAB), np.nan, np.float32)
    with pytest.raises(NumericalError, match="not a number"):
        measure(pair, [Text([5], [token_at(1), token_at(2)])])


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


def trial(nats, least=0.1, error=0.0):
    gains = {"changed": None if nats is None else Gain(nats, error)}
    return Trial(check="it", gains=gains, least=least, advice="change it")


@pytest.mark.parametrize(
    ("trials", "ok"),
    [
        ([trial(0.2), trial(0.05), trial(None)], [False, True, True]),
        ([trial(0.2), trial(0.4), trial(0.5)], [True, False, False]),  # by accident, the first
        ([trial(0.2), trial(0.5, least=0.6)], [False, True]),
    ],
)
def test_judging(trials, ok):
    assert [finding.ok for finding in judge(trials)] == ok


def test_messages_of_trials():
    trials = [trial(0.2), trial(0.05), trial(1.58, error=0.6), trial(-0.1, error=0.1), trial(None)]
    assert [judge([each])[0].message for each in trials] == [
        "changed: the target's tokens are 1.22x as probable; change it",
        "no significant improvement (best alternative: changed, 1.05x)",
        "no significant improvement (best alternative: changed, 4.85x, within noise)",
        "no significant improvement (best alternative: changed, 0.90x)",
        "no alternative to try",
    ]


def test_mask_candidates(byte_tokenizer):
    assert byte_tokenizer.size == VOCAB
    names = {0: "<|start|>", 1: "<|end|>", 2: "<|stop|>"}
    assert mask_candidates(byte_tokenizer, 1, VOCAB) == {0: names[0], 2: names[2]}
    assert list(mask_candidates(byte_tokenizer, 1, VOCAB + 1)) == [VOCAB, 0, 2]


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
