"""A training run: its drafter, its options, its result, and its folder.

A folder says what resumes and what is refused; a full disk leaves it usable.
"""

import json
import os
import shutil
import signal
import stat
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from failures import failing, full_disk
from small_training import CPU, TINY_RUN, TINY_VOCAB, tensors, texts_of, train_steps
from stand_ins import stand_in

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request
from treeflash.drafters.evaluation import DrafterEvaluation, read_evaluation
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.drafters.loading import drafter_config
from treeflash.errors import BackendError, CheckpointError, ConfigError, UnsupportedModelError
from treeflash.reference.backend import load as load_reference
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import edit_config, write_drafter, write_target
from treeflash.training.config import trained_head_name
from treeflash.training.distillation import Response, respond

require("torch")

import torch
from families import cuda as families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, NanoChatConfig
from treeflash_cuda.backend import load
from treeflash_cuda.target_loading import load_target
from treeflash_cuda.training import loop
from treeflash_cuda.training.data import split
from treeflash_cuda.training.entry import train
from treeflash_cuda.training.initial import drafter_settings, initial_drafter
from treeflash_cuda.training.run import CHECKPOINT, TrainingRun

pytestmark = pytest.mark.sample(1)


@pytest.fixture(scope="module")
def responses(target):
    """24 answers of 24 tokens that the target wrote."""
    config = DecodeConfig(method="ar", max_tokens=24)
    prompts = [text.prompt_ids for text in texts_of(*[(6, 1)] * 24)]
    requests = [Request(prompt_ids=prompt, config=config) for prompt in prompts]
    answers = dict(respond(load(target, None, CPU), requests, 8))
    return [
        Response(prompt_ids=prompt, response_ids=tuple(answers[n]))
        for n, prompt in enumerate(prompts)
    ]


@pytest.fixture
def run(target, responses, tmp_path):
    """Train in a folder of the test; return the records of the steps."""

    def run(name="out", **changes):
        return train_steps(target, tmp_path / name, responses, **changes)

    return run


def stored(tensor):
    return torch.from_numpy(tensor).bfloat16().float().numpy()


def initial(folder, family, **changes):
    """A target of a family, and the drafter with which a run for it would start."""
    families.write(folder, family)
    target = load_target(folder, CPU, pack=False)
    config = replace(TINY_RUN, **changes)
    return target, *initial_drafter(config, drafter_settings(config, target), target, [[3, 4, 5]])


@pytest.mark.parametrize("family", ["cohere", "gemma3_text", "lfm2", "olmo", "qwen3_5_text"])
def test_layers_of_another_form_are_not_copied(tmp_path, family):
    """One norm for attention and MLP, norms behind them, other names, no weights, and gates."""
    with pytest.raises(ConfigError, match=f"{family} cannot be copied .* use --init random"):
        initial(tmp_path, family, layers=1)


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("family", "theta"), [("beam", 10_000), ("cohere2_moe", 10_000), ("lfm3", 1_000_000)]
)
def test_a_target_need_not_have_all_settings_of_a_drafter(family, theta, tmp_path):
    """Some layers without rotary embeddings, layer norms, and embeddings that no drafter has."""
    _, drafter, _ = initial(tmp_path, family, init="random", layers=1)
    inv_freq = drafter.config.inv_freq
    assert inv_freq[1] == pytest.approx(theta ** (-1 / len(inv_freq)))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_run_starts_with_layers_that_compute_what_they_did_in_the_target(tmp_path, family):
    """With biases, which norms do not scale, and with norms of queries and keys.

    The drafter has the target's last layer, and reads the layer below it: its layer then has the
    target's keys and values of the context.
    """
    target, drafter, head = initial(tmp_path, family, layers=1)
    (layer,), source = drafter.layers, target.layers[-1]
    size, count = target.config.hidden_size, target.config.num_hidden_layers
    x = torch.randn(1, 3, size, generator=torch.Generator().manual_seed(0))
    for part, norm, names in (
        ("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj")),
        ("mlp", "post_attention_layernorm", ("gate_proj", "up_proj")),
    ):
        own, theirs = (getattr(each, norm)(x) for each in (layer, source))
        for name in names:
            found, expected = (getattr(getattr(y, part), name) for y in (layer, source))
            torch.testing.assert_close(found(own), expected(theirs))
    norms = [getattr(y.self_attn, "k_norm", None) for y in (layer, source)]
    if norms[1] is not None:
        torch.testing.assert_close(*(norm.weight for norm in norms))
    assert drafter.config.target_layer_ids[-1] == count - 2
    torch.testing.assert_close(drafter.fc.weight[:, -size:], torch.eye(size))
    assert not drafter.fc.weight[:, :-size].any()
    assert not head.d.weight.any()


def test_a_missing_package_is_named(target, responses, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(BackendError, match=r"^training needs tensorboard; pip install '.\[cuda,tr"):
        train(target, responses, tmp_path, TINY_RUN, CPU)


def test_a_target_that_caps_its_logits_is_refused(tmp_path):
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": TINY_VOCAB, "hidden_size": 32, "intermediate_size": 64}
    config = NanoChatConfig(**shape, final_logit_softcapping=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"do more than multiply .* cannot be trained"):
        train_steps(tmp_path, tmp_path / "drafter", layers=1)


def test_recurrent_layers_cannot_score_drafts_beside_each_other(tmp_path):
    write_target(tmp_path, "qwen3_5", seed=1)
    target = load_target(tmp_path, CPU, pack=False)
    with pytest.raises(ConfigError, match="on-policy needs a target without recurrent layers"):
        drafter_settings(replace(TINY_RUN, on_policy=0.5), target)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init": "random", "head": "none"},
        {"head": "linear", "accumulation": 2, "negatives": 8, "cache_gb": 1.0},
        {"loss": "0.1 ce + 0.9 tv", "position_weights": "prefix-product", "on_policy": 0.5},
        {"loss": "lk", "head": "markov", "negatives": 8},
        {"head": "selector"},
    ],
    ids=["target", "random-dflash", "linear-shortlist", "on-policy", "markov", "selector"],
)
def test_a_run_interrupted_anywhere_equals_one_that_was_not(changes, run, tmp_path):
    assert [record["step"] for record in run("whole", **changes)] == [1, 2, 3, 4, 5, 6]
    for steps in (3, 2):  # past the states after steps 2 and 4
        run("parts", stop=steps, **changes)
    assert run("parts", **changes)[0]["step"] == 5
    expected, found = (read_tensors(tmp_path / name) for name in ("whole", "parts"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor), name
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    for left, right in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert left.pop("seconds") > 0
        assert right.pop("seconds") > 0
        assert left == right


def test_validation_texts_are_not_trained_on(responses):
    twice = [*responses, *(replace(r, response_ids=r.response_ids[:9]) for r in responses)]
    config = replace(TINY_RUN, validation_sequences=3)
    held_out, rest = split(twice, [], config)
    assert len(held_out) >= config.validation_sequences
    assert not {text.prompt_ids for text in held_out} & {text.prompt_ids for text in rest}
    assert len(held_out) + len(rest) == len(twice)


def test_given_validation_texts_take_their_prompts_out_of_training(target, responses, tmp_path):
    given = [replace(response, response_ids=(5, 6, 7)) for response in responses[:4]]
    options = {"steps": 1, "validate_every": 1, "held_out": given}
    (alone,) = train_steps(target, tmp_path / "alone", responses[4:], **options)
    (beside,) = train_steps(target, tmp_path / "beside", responses, **options)
    assert beside.pop("seconds") > 0
    assert alone.pop("seconds") > 0
    assert beside == alone
    assert len(alone["validation"]["kl_marginal"]) == TINY_RUN.block_size - 1
    with pytest.raises(ConfigError, match="leave nothing to train on after 24 are held out"):
        train_steps(target, tmp_path / "none", responses, held_out=responses)


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 4}, "layers must be below the target's 4, got 4; pass a smaller --layers"),
        ({"layers": None}, "below the target's 4, and its default is 5; pass a smaller --layers"),
        ({"target_layer_ids": (9,)}, "target-layer-ids must be from 0 to 3"),
        ({"mask_token_id": 40}, "mask-token-id must be from 0 to 39, got 40"),
        ({"max_length": 4}, "every response is shorter than two tokens after truncation; raise"),
        ({"validation_sequences": 99}, "leave nothing to train on .* --validation-sequences"),
    ],
)
def test_options_that_do_not_fit_the_target_are_named_before_it_is_loaded(
    changes, message, target, responses, tmp_path
):
    weightless = tmp_path / "target"
    shutil.copytree(target, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ConfigError, match=message):
        train_steps(weightless, tmp_path / "out", responses, **changes)


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("token_ids", "mask"),
    [
        ({"pad_token_id": -1, "eos_token_id": [7, 8]}, 7),
        ({"pad_token_id": None, "eos_token_id": [], "bos_token_id": 5}, 5),
        ({"pad_token_id": None, "eos_token_id": TINY_VOCAB, "bos_token_id": None}, 0),
    ],
)
def test_a_new_drafters_mask_is_a_token_of_the_vocabulary(token_ids, mask, target, tmp_path):
    """Published configurations have such values where a model has no token for a role."""
    folder = shutil.copytree(target, tmp_path / "target")
    edit_config(folder, lambda config: config.update(token_ids))
    train_steps(folder, tmp_path / "out", steps=1)
    assert drafter_config(tmp_path / "out").mask_token_id == mask


def test_dropped_responses_are_counted(target, responses, tmp_path):
    dropped = texts_of((1, 1), (30, 3), (29, 3))
    held_out = [*dropped[:1], *responses[:2]]
    config = replace(TINY_RUN, max_length=30)
    records = train(target, [*responses, *dropped], tmp_path, config, CPU, held_out)
    assert next(records) == {"too_short": 2, "too_long": 2}
    assert next(records)["step"] == 1


def test_a_target_is_not_an_initial_drafter(target, run):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(init=str(target))


@pytest.mark.parametrize(
    ("architecture", "settings", "part"),
    [
        ("Lfm2DSparkDraftModel", {"rope_is_neox_style": False}, "interleaved rotary embeddings"),
        ("Qwen35DSparkModel", {"enable_qwen35_gated_q_proj": True}, "gated queries"),
    ],
)
def test_channels_in_another_order_are_not_trained(architecture, settings, part, run, tmp_path):
    """They would be written in the order in which they were loaded."""
    run("first", head="markov", steps=1)
    settings = {"architectures": [architecture], **settings}
    edit_config(tmp_path / "first", lambda config: config.update(settings))
    with pytest.raises(ConfigError, match=f"training does not support .* has {part}"):
        run("second", head_size=None, head="markov", init=str(tmp_path / "first"))


def test_responses_of_another_vocabulary_are_refused(target, tmp_path):
    foreign = [Response(prompt_ids=(1,), response_ids=(TINY_VOCAB, 2))]
    with pytest.raises(ConfigError, match="outside the target's vocabulary"):
        train_steps(target, tmp_path, foreign)


@pytest.mark.parametrize("head", ["swiglu", "linear", "markov", "selector", "none"])
def test_a_trained_drafter_loads_and_decodes_losslessly(head, run, target, responses, tmp_path):
    records = run(head=head)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "After 6 of 6 steps" in card
    assert "kl_marginal" in card
    shares = records[-1]["validation"][f"top1_{'marginal' if head == 'none' else 'corrected'}"]
    expected = DrafterEvaluation(by_depth=tuple(shares), max_length=TINY_RUN.max_length)
    assert read_evaluation(tmp_path / "out") == expected
    for loader, config in ((load, CPU), (load_reference, LoadConfig())):
        backend = loader(target, tmp_path / "out", config)
        assert trained_head_name(backend.drafter_config.head) == head
        methods = "ar", "ddtree" if head == "none" else "treeflash"
        configs = [DecodeConfig(method=x, budget=8, max_tokens=20) for x in methods]
        plain, drafted = (generate(backend, responses[0].prompt_ids, x) for x in configs)
        assert plain == drafted


def test_a_frozen_backbone_does_not_change(run, target, tmp_path):
    write_drafter(tmp_path / "dflash", target, format="dflash", seed=2, block_size=5)
    records = run(init=str(tmp_path / "dflash"), freeze_backbone=True, steps=12)
    before, after = tensors(tmp_path / "dflash"), tensors(tmp_path / "out")
    for name, tensor in before.items():
        assert np.array_equal(after[name], stored(tensor)), name
    assert after["ar_approximation.d.weight"].any()
    validation = records[-1]["validation"]
    assert sum(validation["kl_corrected"]) < sum(validation["kl_marginal"])


def test_frozen_layers_leave_the_head_and_fc_to_be_trained(run, target, tmp_path):
    write_drafter(tmp_path / "drafter", target, seed=2, block_size=5)
    run(init=str(tmp_path / "drafter"), head_size=None, freeze_layers=True)
    before, after = tensors(tmp_path / "drafter"), tensors(tmp_path / "out")
    changed = {name for name in before if not np.allclose(before[name], after[name], rtol=1e-2)}
    assert "fc.weight" in changed
    assert changed - {"fc.weight"}
    assert all(name == "fc.weight" or "ar_approximation" in name for name in changed)


def test_training_starts_from_a_treeflash_checkpoint(run, tmp_path):
    first = run("first", steps=40)
    changes = {"init": str(tmp_path / "first"), "seed": 1}
    second = run("second", **changes)
    card = (tmp_path / "second" / "README.md").read_text()
    assert "2 layers" in card
    assert "| layers |" not in card
    assert second[0]["loss"] < first[0]["loss"] / 2
    with pytest.raises(ConfigError, match=r"has head-size \d+, not 3; leave it out"):
        run("third", **changes, head_size=3)


@pytest.mark.parametrize(("head", "has_kinds"), [("swiglu", True), ("selector", False)])
def test_appended_layers_change_nothing_at_first(head, has_kinds, run, tmp_path, monkeypatch):
    run("first", head=head, steps=4)
    if not has_kinds:  # layers then attend to everything
        edit_config(tmp_path / "first", lambda config: config.pop("layer_types"))
    changes = {"head_size": None, "head": head, "init": str(tmp_path / "first"), "steps": 4}
    same, deeper = run("same", layers=None, **changes), run("deeper", layers=4, **changes)
    assert deeper[0]["loss"] == pytest.approx(same[0]["loss"], rel=1e-6)
    assert deeper[-1]["loss"] != same[-1]["loss"]
    assert drafter_config(tmp_path / "deeper").num_hidden_layers == 4
    nested = {"transformer_layer_config": read_config(tmp_path / "first")}
    monkeypatch.setattr("treeflash_cuda.training.initial.read_config", lambda _: nested)
    with pytest.raises(ConfigError, match="layers cannot be added to the format"):
        run("third", layers=4, **changes)


@pytest.mark.sample(None)
@pytest.mark.parametrize("head", ["markov", "selector"])
def test_training_continues_from_a_drafter_with_another_head(head, run, tmp_path):
    run("first", head=head, steps=1)
    changes = {"head_size": None, "head": head, "init": str(tmp_path / "first"), "steps": 1}
    run("second", **changes, learning_rate=1e-30)
    first, second = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    assert all(np.allclose(second[name], x, rtol=0, atol=1e-9) for name, x in first.items())
    with pytest.raises(ConfigError, match=r"has head-size 48, not 3; leave it out"):
        run("third", **{**changes, "head_size": 3})
    with pytest.raises(ConfigError, match=f"has the head {head}, and its layers cannot serve"):
        run("third", **{**changes, "head": "swiglu"})


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("Qwen3DSparkModel", {}),  # its root's slot predicts a token
        ("MuseGlimmerAssistantModel", {"layer_types": ["sliding_attention"] * 2}),  # sees both ways
    ],
)
def test_a_head_is_not_added_where_its_format_means_another_block(
    architecture, settings, run, tmp_path
):
    run("first", head="none", steps=1)
    settings = {"architectures": [architecture], "sliding_window": 8, **settings}
    edit_config(tmp_path / "first", lambda config: config.update(settings))
    changes = {"head_size": None, "init": str(tmp_path / "first"), "steps": 1}
    assert run("same", head="none", **changes)
    with pytest.raises(ConfigError, match="first has the head none, and its layers cannot serve"):
        run("second", head="swiglu", **changes)


def test_training_stops_when_the_time_is_over(run, monkeypatch):
    def take_step(step, rate, *_):
        return {"step": step + 1, "learning_rate": rate, "loss": 1.0, "seconds": 6.0}

    stand_in(monkeypatch, loop, take_step=take_step)
    limits = {"steps": 100, "minutes": 0.5, "warmup": 0.0, "validate_every": 50}
    found = run(**limits)
    assert len(found) == 5
    rates = [record["learning_rate"] for record in found]
    assert rates[0] == TINY_RUN.learning_rate
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < TINY_RUN.learning_rate / 2, "the learning rate decays with the time"
    assert "validation" in found[-1]
    assert run(**limits) == [], "the run is over"


def test_the_best_drafter_is_kept_when_the_validation_loss_rises(run, tmp_path):
    """A rate that is too high spoils the drafter after a while."""
    limits = {"steps": 40, "patience": 2, "validate_every": 1, "warmup": 0.0}
    records = run(learning_rate=0.05, **limits)
    losses = [loop.validation_loss(record["validation"], TINY_RUN) for record in records]
    best = losses.index(min(losses)) + 1
    assert len(records) == best + 2 < 40
    assert f"After {best} of 40 steps" in (tmp_path / "out" / "README.md").read_text()


def test_the_best_drafter_is_not_replaced_by_the_last_one_where_it_was_deleted(run, tmp_path):
    limits = {"steps": 40, "patience": 1, "validate_every": 1, "warmup": 0.0}
    assert len(run(learning_rate=0.05, **limits)) < 40
    deleted = tmp_path / "out" / "model.safetensors"
    deleted.unlink()
    with pytest.raises(ConfigError, match="lost the drafter with the lowest validation loss"):
        run(learning_rate=0.05, **limits)
    assert not deleted.exists()


OTHER = texts_of((5, 9), (9, 5))
LONGER_PROMPTS = texts_of(*[(6, 14)] * 8)  # the tokens of the usual texts


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def steps(target, folder):
    """Train in the folder of the test; return the numbers of the steps."""

    def steps(target=target, texts=None, **changes):
        return [record["step"] for record in train_steps(target, folder, texts, **changes)]

    return steps


@pytest.fixture(scope="module")
def runs(target, tmp_path_factory):
    """The folders of a run that was interrupted after its first save, and of one that has ended."""
    folder = tmp_path_factory.mktemp("runs")
    train_steps(target, folder / "stopped", stop=2)
    train_steps(target, folder / "finished")
    return folder


@pytest.fixture
def stopped(runs, folder):
    """A copy of the interrupted run in the folder of the test."""
    shutil.copytree(runs / "stopped", folder)


@pytest.fixture
def finished(runs, folder):
    """A copy of the run that has ended in the folder of the test."""
    shutil.copytree(runs / "finished", folder)


@pytest.mark.usefixtures("stopped")
def test_a_save_or_a_line_of_the_log_that_was_cut_short_does_not_matter(steps, folder):
    shutil.copytree(folder / "state", folder / "state.old")
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert steps() == [3, 4, 5, 6]
    assert len((folder / "log.jsonl").read_text().splitlines()) == 6


def test_a_run_killed_after_its_best_drafter_and_before_a_save_goes_on(steps):
    limits = {"patience": 3, "validate_every": 1, "save_every": 6}
    assert steps(stop=2, **limits) == [1, 2]
    assert steps(**limits)[0] == 2, "the state is saved with the first drafter, after step 1"


def test_the_checkpoint_is_written_before_the_last_state(steps, folder):
    with failing(loop, "export", KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        steps(save_every=6)
    assert not (folder / "state").exists()


@pytest.fixture
def send(monkeypatch):
    """Send signals in a step of the runs of the test."""
    take_step = loop.take_step

    def send(number, *signals):
        def take_interrupted_step(step, *arguments):
            for each in signals if step + 1 == number else ():
                signal.raise_signal(each)
            return take_step(step, *arguments)

        stand_in(monkeypatch, loop, take_step=take_interrupted_step)

    return send


@pytest.fixture
def on_interrupt():
    """Set the handler of Ctrl-C until the test ends; shells turn it off for background jobs."""
    before = signal.getsignal(signal.SIGINT)
    yield partial(signal.signal, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("number", "hint", "end"),
    [
        (signal.SIGINT, "; press Ctrl-C again to stop", KeyboardInterrupt),
        (signal.SIGTERM, "$", SystemExit),
    ],
)
@pytest.mark.usefixtures("stopped")
def test_a_signal_loses_no_step(number, hint, end, steps, folder, runs, send, on_interrupt):
    """The running step ends, and its state and drafter are saved, unless Ctrl-C follows."""
    on_interrupt(signal.default_int_handler)
    cases = ((number, signal.SIGINT), KeyboardInterrupt, 2), ((number,), end, 3)
    for signals, raised, step in cases:
        send(3, *signals)
        with (
            pytest.warns(UserWarning, match=f"saved after this step{hint}"),
            pytest.raises(raised) as stop,
        ):
            steps()
        assert json.loads((folder / "state" / "run.json").read_text())["step"] == step
    assert getattr(stop.value, "code", 128 + number) == 128 + number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "After 3 of 6 steps" in (folder / "README.md").read_text()
    assert steps() == [4, 5, 6]
    expected, found = (read_tensors(x) for x in (runs / "finished", folder))
    assert all(np.array_equal(found[name], x) for name, x in expected.items())


@pytest.mark.usefixtures("stopped")
def test_an_interrupt_that_a_shell_has_turned_off_stays_off(steps, send, on_interrupt):
    on_interrupt(signal.SIG_IGN)
    send(3, signal.SIGINT)
    assert steps() == [3, 4, 5, 6]


@pytest.mark.usefixtures("stopped")
def test_a_drafter_without_a_state_is_not_overwritten(steps, folder):
    (folder / "state").rename(folder / "state.new")  # an interrupted first save
    assert steps(stop=2)
    shutil.rmtree(folder / "state")
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="would overwrite it; give another --output"):
        steps()
    assert (folder / "log.jsonl").read_bytes() == before


@pytest.mark.sample(None)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
@pytest.mark.usefixtures("finished")
def test_a_finished_run_restores_a_deleted_file_of_its_checkpoint(name, steps, folder):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    assert steps() == []
    assert (folder / name).read_bytes() == content


@pytest.mark.usefixtures("finished")
def test_a_finished_run_is_left_as_it_is_without_its_target(steps, folder, target, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert steps(target=tmp_path / "absent" / target.name) == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("finished", {"steps": 7}, "with steps 6, not 7; .* another --output, .*train --init"),
        ("finished", {"texts": OTHER}, "on other responses; use the same files, .*train --init"),
        ("stopped", {"steps": 7}, "has a run with steps 6, not 7"),
        ("stopped", {"layers": 1}, "has a run with layers 2, not 1"),
        ("stopped", {"init": "random"}, "has a run with init target, not random"),
        ("stopped", {"top_tokens": 4}, "has a run with top_tokens 8, not 4"),
        ("stopped", {"texts": OTHER}, "has a run on other responses; use the same files"),
        ("stopped", {"texts": LONGER_PROMPTS}, "has a run on other responses; use the same files"),
        ("finished", {"texts": LONGER_PROMPTS}, "has a run on other responses"),
        ("stopped", {"target": "other"}, "has a run with target {target}, not other"),
    ],
)
def test_a_run_does_not_go_on_with_what_changed(
    kind, changes, message, steps, runs, folder, target, tmp_path
):
    shutil.copytree(runs / kind, folder)
    if "target" in changes:
        changes = {"target": shutil.copytree(target, tmp_path / changes["target"])}
    with pytest.raises(ConfigError, match=message.format(target=target.name)):
        steps(**changes)


@pytest.mark.sample(5)
@pytest.mark.parametrize("content", [None, b"", b"garbage", b"{}", "half"])
@pytest.mark.parametrize("name", ["run.json", "pytorch_model.bin", "optimizer.bin"])
@pytest.mark.usefixtures("stopped")
def test_a_damaged_state_is_named(name, content, steps, folder):
    path = folder / "state" / name
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(ConfigError, match="state is damaged, so training cannot be resumed"):
        steps()


@pytest.mark.sample(None)
@pytest.mark.parametrize("line", ["\0\0\n", "{}\n", "3\n"])
@pytest.mark.usefixtures("stopped")
def test_a_damaged_log_is_named(line, steps, folder):
    (folder / "log.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=r"log\.jsonl is damaged, so training cannot be resumed"):
        steps()


@pytest.mark.sample(2)
@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
@pytest.mark.parametrize("size", [10, 500, 40_000, 120_000, 200_000])
def test_a_full_disk_is_one_clear_error(size, cache_gb, steps, folder, monkeypatch):
    # Python would leave modules' bytecode that the limit has cut off.
    stand_in(monkeypatch, sys, dont_write_bytecode=True)
    with (
        full_disk(size),
        pytest.raises(ConfigError, match=r"run/.* cannot be written") as caught,
    ):
        steps(cache_gb=cache_gb)
    assert "\n" not in str(caught.value)
    assert steps(cache_gb=cache_gb)[-1] == 6


@pytest.mark.sample(None)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.usefixtures("stopped")
def test_all_processes_resume_from_the_state_that_the_first_one_puts_back(folder, first):
    """An interrupted save had moved it away."""
    (folder / "state").rename(folder / "state.old")

    class Process:
        is_main_process = first

        def wait_for_everyone(self):
            if not first:
                (folder / "state.old").rename(folder / "state")

        def load_state(self, folder):
            pass

    with closing(TrainingRun(folder, Process(), {}, "")) as run:
        assert run.resume() == 2


@pytest.mark.parametrize("kept", [0, 0.5])
def test_cached_features_that_were_cut_short_are_computed_again(kept, steps, folder):
    assert steps(cache_gb=1, stop=2) == [1, 2]
    (shard,) = folder.glob("features/*/*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(kept * len(whole))])
    assert steps(cache_gb=1) == [3, 4, 5, 6]
    assert shard.read_bytes() == whole


def test_tensorboard_shows_each_step_once(steps, folder):
    steps(stop=3)  # beyond the state after step 2
    steps()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(record["step"], pytest.approx(record["loss"])) for record in log]
    assert [event.step for event in events.Scalars("validation/chain_corrected")] == [2, 4, 6]
    assert len(events.Scalars("validation/kl_marginal/4")) == 3


def test_written_files_follow_the_umask(steps, folder):
    """Safetensors makes files that only their owner can read."""
    before = os.umask(0o027)
    try:
        steps(steps=1)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((folder / name).stat().st_mode) for name in CHECKPOINT}
    assert modes == dict.fromkeys(CHECKPOINT, 0o640)
