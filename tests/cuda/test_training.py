"""A training run: its initial drafter, its interruption, and its result."""

import json
from dataclasses import replace

import numpy as np
import pytest
from small_training import CPU, TINY_RUN, TINY_VOCAB

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, decode
from treeflash.drafters.evaluation import DrafterEvaluation, read_evaluation
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.drafters.loading import drafter_config
from treeflash.errors import BackendError, CheckpointError, ConfigError
from treeflash.reference.backend import load as load_reference
from treeflash.testing import require
from treeflash.testing.models import edit_config, write_drafter, write_target
from treeflash.training.config import trained_head_name
from treeflash.training.distillation import Response, respond

require("torch")

import torch
from families import cuda as families
from treeflash_cuda.backend import load
from treeflash_cuda.target_loading import load_target
from treeflash_cuda.training import entry, loop
from treeflash_cuda.training.entry import train
from treeflash_cuda.training.initial import drafter_settings, initial_drafter

pytestmark = pytest.mark.sample(1)

TINY = replace(
    TINY_RUN,
    head_size=48,
    steps=6,
    learning_rate=3e-3,
    validation_sequences=3,
    validate_every=3,
    save_every=2,
)


@pytest.fixture(scope="module")
def responses(target):
    random = np.random.default_rng(3)
    config = DecodeConfig(method="ar", max_tokens=24)
    requests = [
        Request(prompt_ids=tuple(random.integers(2, TINY_VOCAB, 6).tolist()), config=config)
        for _ in range(24)
    ]
    answers = dict(respond(load(target, None, CPU), requests, 8))
    return [
        Response(prompt_ids=request.prompt_ids, response_ids=tuple(answers[n]))
        for n, request in enumerate(requests)
    ]


def run(target, responses, output, config, steps=None):
    """The records of the steps; stops after `steps` of them, as an interruption would."""
    records = []
    for record in train(target, responses, output, config, CPU):
        if "step" in record:
            records.append(record)
        if len(records) == steps:
            break
    return records


@pytest.mark.parametrize("family", ["cohere", "gemma3_text", "lfm2", "olmo", "qwen3_5_text"])
def test_layers_of_another_form_are_not_copied(tmp_path, family):
    """One norm for attention and MLP, norms behind them, other names, no weights, and gates."""
    families.write(tmp_path, family)
    target = load_target(tmp_path, LoadConfig(device="cpu", dtype="float32"), pack=False)
    config = replace(TINY, layers=1)
    settings = drafter_settings(config, target)
    with pytest.raises(ConfigError, match=f"{family} cannot be copied .* use --init random"):
        initial_drafter(config, settings, target, [])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_copied_layers_project_what_the_targets_do(tmp_path, family):
    """With biases, which norms do not scale, and with norms of queries and keys."""
    families.write(tmp_path, family)
    target = load_target(tmp_path, LoadConfig(device="cpu", dtype="float32"), pack=False)
    config = replace(TINY, layers=1)
    drafter, _ = initial_drafter(config, drafter_settings(config, target), target, [[3, 4, 5]])
    (layer,), source = drafter.layers, target.layers[-1]
    x = torch.randn(1, 3, target.config.hidden_size, generator=torch.Generator().manual_seed(0))
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


def test_a_missing_package_is_named(target, responses, tmp_path, monkeypatch):
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"^training needs tensorboard; pip install '.\[cuda,tr"):
        train(target, responses, tmp_path, TINY, CPU)


def test_recurrent_layers_cannot_score_drafts_beside_each_other(tmp_path):
    write_target(tmp_path, "qwen3_5", seed=1)
    target = load_target(tmp_path, LoadConfig(device="cpu", dtype="float32"), pack=False)
    with pytest.raises(ConfigError, match="on-policy needs a target without recurrent layers"):
        drafter_settings(replace(TINY, on_policy=0.5), target)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, init="random", head="none"),
        replace(TINY, head="linear", accumulation=2, negatives=8, cache_gb=1.0),
        replace(TINY, loss="0.1 ce + 0.9 tv", position_weights="prefix-product", on_policy=0.5),
        replace(TINY, loss="lk", head="markov", negatives=8),
        replace(TINY, head="selector"),
    ],
    ids=["target", "random-dflash", "linear-shortlist", "on-policy", "markov", "selector"],
)
def test_a_run_interrupted_anywhere_equals_one_that_was_not(config, target, responses, tmp_path):
    whole = run(target, responses, tmp_path / "whole", config)
    assert [record["step"] for record in whole] == [1, 2, 3, 4, 5, 6]
    for steps in (3, 2):  # past the states after steps 2 and 4
        run(target, responses, tmp_path / "parts", config, steps)
    resumed = run(target, responses, tmp_path / "parts", config)
    assert resumed[0]["step"] == 5
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
    from treeflash_cuda.training.data import split

    twice = [*responses, *(replace(r, response_ids=r.response_ids[:9]) for r in responses)]
    held_out, rest = split(twice, [], TINY)
    assert len(held_out) >= TINY.validation_sequences
    assert not {text.prompt_ids for text in held_out} & {text.prompt_ids for text in rest}
    assert len(held_out) + len(rest) == len(twice)


def test_given_validation_texts_take_their_prompts_out_of_training(target, responses, tmp_path):
    config = replace(TINY, steps=1, validate_every=1)
    given = [replace(response, response_ids=(5, 6, 7)) for response in responses[:4]]
    alone, beside = (
        list(train(target, texts, tmp_path / name, config, CPU, given))[-1]
        for name, texts in (("alone", responses[4:]), ("beside", responses))
    )
    assert beside.pop("seconds") > 0
    assert alone.pop("seconds") > 0
    assert beside == alone
    assert len(alone["validation"]["kl_marginal"]) == TINY.block_size - 1
    with pytest.raises(ConfigError, match="leave nothing to train on after 24 are held out"):
        list(train(target, responses, tmp_path / "none", config, CPU, responses))


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 4}, "layers must be below the target's 4, got 4; pass a smaller --layers"),
        ({"layers": None}, "below the target's 4, and its default is 5; pass a smaller --layers"),
        ({"target_layer_ids": (9,)}, "target-layer-ids must be from 0 to 3"),
        ({"target_layer_ids": ()}, "target-layer-ids must be at least one number, each 0 or more"),
        ({"mask_token_id": 40}, "mask-token-id must be from 0 to 39, got 40"),
        ({"mask_token_id": -1}, "mask-token-id must be 0 or more"),
        ({"max_length": 4}, "every response is shorter than two tokens after truncation; raise"),
        ({"validation_sequences": 99}, "leave nothing to train on .* --validation-sequences"),
    ],
)
def test_options_that_do_not_fit_the_target_are_named_before_it_is_loaded(
    changes, message, target, responses, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "load_target", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        run(target, responses, tmp_path, replace(TINY, **changes))


def test_dropped_responses_are_counted(target, responses, tmp_path):
    dropped = [
        Response(prompt_ids=(3,), response_ids=(4,)),
        Response(prompt_ids=tuple(range(30)), response_ids=(4, 5, 6)),
        Response(prompt_ids=tuple(range(29)), response_ids=(4, 5, 6)),
    ]
    config = replace(TINY, max_length=30)
    held_out = [*dropped[:1], *responses[:2]]
    records = train(target, [*responses, *dropped], tmp_path, config, CPU, held_out)
    assert next(records) == {"too_short": 2, "too_long": 2}
    assert next(records)["step"] == 1


def test_a_target_is_not_an_initial_drafter(target, responses, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(target, responses, tmp_path, replace(TINY, init=str(target)))


@pytest.mark.parametrize(
    ("architecture", "settings", "part"),
    [
        ("Lfm2DSparkDraftModel", {"rope_is_neox_style": False}, "interleaved rotary embeddings"),
        ("Qwen35DSparkModel", {"enable_qwen35_gated_q_proj": True}, "gated queries"),
    ],
)
def test_channels_in_another_order_are_not_trained(
    architecture, settings, part, target, responses, tmp_path
):
    """They would be written in the order in which they were loaded."""
    run(target, responses, tmp_path / "first", replace(TINY, head="markov", steps=1))
    settings = {"architectures": [architecture], **settings}
    edit_config(tmp_path / "first", lambda config: config.update(settings))
    config = replace(TINY, head_size=None, head="markov", init=str(tmp_path / "first"))
    with pytest.raises(ConfigError, match=f"training does not support .* has {part}"):
        run(target, responses, tmp_path / "second", config)


def test_responses_of_another_vocabulary_are_refused(target, tmp_path):
    foreign = [Response(prompt_ids=(1,), response_ids=(TINY_VOCAB, 2))]
    with pytest.raises(ConfigError, match="outside the target's vocabulary"):
        run(target, foreign, tmp_path, TINY)


def test_copied_layers_compute_what_they_did_in_the_target(target, responses, tmp_path):
    """An untrained drafter has the target's last layers, and reads the layer below them.

    Its first layer then has the target's keys and values of the context.
    """
    run(target, responses, tmp_path, replace(TINY, learning_rate=1e-12), 2)
    tensors, source = read_tensors(tmp_path), read_tensors(target)
    assert read_config(tmp_path)["dflash_config"]["target_layer_ids"][-1] == 1
    norm = source["model.layers.2.input_layernorm.weight"]
    for name in ("q", "k", "v"):
        expected = source[f"model.layers.2.self_attn.{name}_proj.weight"] * norm
        found = tensors[f"model.layers.0.self_attn.{name}_proj.weight"]
        np.testing.assert_allclose(found, expected, atol=2e-3)  # stored in bfloat16
    fc = tensors["model.fc.weight"]
    np.testing.assert_allclose(fc[:, -32:], np.eye(32), atol=1e-3)
    assert not fc[:, :-32].any()
    np.testing.assert_allclose(tensors["ar_approximation.d.weight"], 0, atol=1e-6)


@pytest.mark.parametrize("head", ["swiglu", "linear", "markov", "selector", "none"])
def test_a_trained_drafter_loads_and_decodes_losslessly(head, target, responses, tmp_path):
    records = run(target, responses, tmp_path, replace(TINY, head=head))
    card = (tmp_path / "README.md").read_text()
    assert "After 6 of 6 steps" in card
    assert "kl_marginal" in card
    shares = records[-1]["validation"][f"top1_{'marginal' if head == 'none' else 'corrected'}"]
    expected = DrafterEvaluation(by_depth=tuple(shares), max_length=TINY.max_length)
    assert read_evaluation(tmp_path) == expected
    prompt = responses[0].prompt_ids
    for loader in (load, load_reference):
        backend = loader(target, tmp_path, CPU if loader is load else LoadConfig())
        assert trained_head_name(backend.drafter_config.head) == head
        plain, drafted = (
            [
                token
                for step in decode(
                    backend,
                    Request(prompt_ids=prompt, config=DecodeConfig(method=method, max_tokens=20)),
                )
                for token in step.tokens
            ]
            for method in ("ar", "ddtree" if head == "none" else "treeflash")
        )
        assert plain == drafted


def test_a_frozen_backbone_does_not_change(target, responses, tmp_path):
    write_drafter(tmp_path / "dflash", target, format="dflash", seed=2, block_size=5)
    config = replace(TINY, init=str(tmp_path / "dflash"), freeze_backbone=True, steps=12)
    records = run(target, responses, tmp_path / "out", config)
    before, after = read_tensors(tmp_path / "dflash"), read_tensors(tmp_path / "out")
    for name, tensor in before.items():
        stored = torch.from_numpy(tensor).bfloat16().float().numpy()
        assert np.array_equal(after[name if name in after else f"model.{name}"], stored), name
    assert after["ar_approximation.d.weight"].any()
    validation = records[-1]["validation"]
    assert sum(validation["kl_corrected"]) < sum(validation["kl_marginal"])


def test_training_starts_from_a_treeflash_checkpoint(target, responses, tmp_path):
    first = run(target, responses, tmp_path / "first", replace(TINY, steps=40))
    config = replace(TINY, init=str(tmp_path / "first"), seed=1)
    second = run(target, responses, tmp_path / "second", config)
    card = (tmp_path / "second" / "README.md").read_text()
    assert "2 layers" in card
    assert "| layers |" not in card
    assert second[0]["loss"] < first[0]["loss"] / 2
    with pytest.raises(ConfigError, match=r"has head-size \d+, not 3; leave it out"):
        run(target, responses, tmp_path / "third", replace(config, head_size=3))


@pytest.mark.parametrize(("head", "has_kinds"), [("swiglu", True), ("selector", False)])
def test_appended_layers_change_nothing_at_first(
    head, has_kinds, target, responses, tmp_path, monkeypatch
):
    run(target, responses, tmp_path / "first", replace(TINY, head=head, steps=4))
    if not has_kinds:  # layers then attend to everything
        edit_config(tmp_path / "first", lambda config: config.pop("layer_types"))
    config = replace(TINY, head_size=None, head=head, init=str(tmp_path / "first"), steps=4)
    same = run(target, responses, tmp_path / "same", replace(config, layers=None))
    deeper = run(target, responses, tmp_path / "deeper", replace(config, layers=4))
    assert deeper[0]["loss"] == pytest.approx(same[0]["loss"], rel=1e-6)
    assert deeper[-1]["loss"] != same[-1]["loss"]
    assert drafter_config(tmp_path / "deeper").num_hidden_layers == 4
    nested = {"transformer_layer_config": read_config(tmp_path / "first")}
    monkeypatch.setattr("treeflash_cuda.training.initial.read_config", lambda _: nested)
    with pytest.raises(ConfigError, match="layers cannot be added to the format"):
        run(target, responses, tmp_path / "third", replace(config, layers=4))


# Two runs of 40 steps; the test of a checkpoint above goes the same way.
@pytest.mark.nightly
@pytest.mark.parametrize("head", ["markov", "selector"])
def test_training_continues_from_a_drafter_with_another_head(head, target, responses, tmp_path):
    run(target, responses, tmp_path / "first", replace(TINY, head=head, steps=40))
    config = replace(TINY, head_size=None, head=head, init=str(tmp_path / "first"), seed=1)
    second = run(target, responses, tmp_path / "second", config)
    first = run(target, responses, tmp_path / "fresh", replace(TINY, head=head, seed=1))
    assert second[0]["loss"] < 0.8 * first[0]["loss"]
    with pytest.raises(ConfigError, match=r"has head-size 48, not 3; leave it out"):
        run(target, responses, tmp_path / "third", replace(config, head_size=3))
    with pytest.raises(ConfigError, match=f"has the head {head}, and its layers cannot serve"):
        run(target, responses, tmp_path / "third", replace(config, head="swiglu"))
