"""Published block drafters of later formats: their numbers, and the mistakes that are usual."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_drafters import (
    BACKENDS,
    FLOAT32,
    TOLERANCE,
    Plant,
    cases,
    load_published,
    needs_fixtures,
    other,
    published,
    setting,
)

from treeflash.config import DecodeConfig
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import build_chain
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.reference import drafter, drafter_model, mtp_head
from treeflash.reference.numerics import attention, rms_norm, rotate, silu, visible
from treeflash.registry import loader
from treeflash.testing.comparisons import generate
from treeflash.testing.models import edit_config

NAMES = (
    "dflash-sinks",
    "dspark-sinks",
    "gemma4-dspark-plain",
    "muse-glimmer-assistant-plain",
    "speculators-peagle",
)
PUBLISHED = [
    *((backend, name) for backend in BACKENDS for name in NAMES),
    ("mlx", "gemma4-dspark"),
    ("mlx", "muse-glimmer-assistant"),
]
pytestmark = needs_fixtures


def chain_after(pair: Any, sequence: SequenceSession, root: int) -> Any:
    """The greedy chain after a root: of the head, or of the marginals."""
    block = sequence.draft(root)
    if pair.head is None:
        (table,) = pair.drafter.marginals([block], TableOptions(k=1))
    else:
        (table,) = pair.head.transitions([block], TableOptions(m=16, k=4))
    return build_chain(table, root, 100)


def largest_error(pair: Any, name: str) -> float:
    """The largest difference from the published log probabilities, of marginals and head."""
    worst = 0.0
    for case, arrays in cases(name):
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(case["prompt"])
            block = sequence.draft(case["root"])
            compared = [(pair.drafter.log_probs(block), arrays["log_probs"])]
            if pair.head is not None:
                previous = np.array([case["root"], *case["draft"][:-1]], np.int32)
                compared.append((pair.head.log_probs(block, previous), arrays["chain_log_probs"]))
        for actual, expected in compared:
            kept = np.isfinite(actual)
            assert kept.sum(-1).tolist() == [expected.shape[1]] * len(expected)
            worst = max(worst, float(np.abs(actual[kept] - expected.ravel()).max()))
    return worst


@pytest.mark.parametrize(("backend", "name"), PUBLISHED)
def test_published_numbers_drafts_and_texts(backend: str, name: str) -> None:
    pair = load_published(backend, name)
    assert largest_error(pair, name) < TOLERANCE
    methods = ("dflash", "ddtree") if pair.head is None else ("treeflash-chain", "treeflash")
    for case, arrays in cases(name):
        tokens = [*case["prompt"], *case["greedy"]]
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(case["prompt"])
            chain = chain_after(pair, sequence, case["root"])
            assert chain.tokens[1:].tolist() == case["draft"]
            if (logits := arrays.get("chain_confidence_logits")) is not None:
                expected = 1 / (1 + np.exp(-logits))
                np.testing.assert_allclose(chain.confidences[1:], expected, atol=TOLERANCE)
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(case["prompt"])
            loop = zip(case.get("loop_chains", ()), case.get("loop_accepted", ()), strict=True)
            for drafted, accepted in loop:
                chain = chain_after(pair, sequence, tokens[sequence.length])
                assert chain.tokens[1:].tolist() == drafted
                sequence.extend(tokens[sequence.length :][: accepted + 1])
        for method in methods:
            config = DecodeConfig(method=method, budget=12, max_tokens=len(case["greedy"]))
            assert generate(pair, case["prompt"], config) == case["greedy"]


def scaled_sinks(factor: float) -> Plant:
    """Multiply the sinks; a factor of -inf leaves them out."""

    def plant(patch: pytest.MonkeyPatch, pair: Any) -> None:
        tensors = pair.drafter_model.tensors
        for name in [name for name in tensors if name.endswith("sink_bias")]:
            tensors[name] = (
                np.full_like(tensors[name], -np.inf) if factor < 0 else factor * tensors[name]
            )

    return plant


def masks_one_position_high(patch: pytest.MonkeyPatch, pair: Any) -> None:
    """Rotate the rows of P-EAGLE's masks, the last ones, as if they were one position later."""
    masks = pair.drafter_model.config.depths - 1

    def rotated(x: Any, positions: Any, *args: Any) -> Any:
        return rotate(x, positions + (np.arange(len(positions)) >= len(positions) - masks), *args)

    patch.setattr(drafter_model, "rotate", rotated)


FAULTS: dict[str, tuple[str, Plant]] = {
    "no sinks": ("dflash-sinks", scaled_sinks(-np.inf)),
    "sinks scaled like scores": ("dflash-sinks", scaled_sinks(0.25)),
    "sinks of DSpark left out": ("dspark-sinks", scaled_sinks(-np.inf)),
    "no window with use_swa": ("dspark-sinks", setting("sliding_windows", (None, None))),
    "a window one shorter": ("dspark-sinks", setting("sliding_windows", (5, 5))),
    "slots that see later ones": ("dspark-sinks", setting("causal", (False, False))),
    "causal where the file says false": ("dflash-sinks", setting("causal", (True, True))),
    "Muse's sliding layers as causal": (
        "muse-glimmer-assistant-plain",
        setting("causal", (True,) * 3),
    ),
    "Muse's window without its end": (
        "muse-glimmer-assistant-plain",
        setting("sliding_windows", (7,) * 3),
    ),
    "Gemma 4's values without a norm": (
        "gemma4-dspark-plain",
        other(
            drafter_model,
            "rms_norm",
            lambda x, weight, eps: x if len(weight) == 1 else rms_norm(x, weight, eps),
        ),
    ),
    "Gemma 4's scores scaled": (
        "gemma4-dspark-plain",
        other(drafter, "attention", lambda q, k, v, mask, *_: attention(q, k, v, mask)),
    ),
    "SiLU in Gemma 4's layers": ("gemma4-dspark-plain", other(drafter_model, "gelu_tanh", silu)),
    "embeddings without a factor": ("gemma4-dspark-plain", setting("input_scale", 1.0)),
    "no softcap before the Markov bias": ("gemma4-dspark-plain", setting("softcap", None)),
    "frequencies of the turning channels alone": (
        "gemma4-dspark-plain",
        setting("inv_freq", (1.0, 1e-3, *[0.0] * 6)),
    ),
    "P-EAGLE's mask embedded by the target": (
        "speculators-peagle",
        lambda patch, pair: pair.drafter_model.vocabulary.pop("embed_tokens.weight"),
    ),
    "P-EAGLE's masks without a state": (
        "speculators-peagle",
        lambda patch, pair: patch.setitem(
            pair.drafter_model.tensors, "mask_hidden", np.zeros((1, 1, 192), np.float32)
        ),
    ),
    "P-EAGLE's masks one position high": ("speculators-peagle", masks_one_position_high),
    "rows of P-EAGLE that see later ones": (
        "speculators-peagle",
        other(mtp_head, "visible", lambda q, k, w, causal: visible(q, k, w, causal=False)),
    ),
    "a causal block": ("gemma4-dspark-plain", setting("causal", (True, True))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_usual_mistakes(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant = FAULTS[fault]
    pair = load_published("reference", name)
    assert largest_error(pair, name) < TOLERANCE
    plant(monkeypatch, pair)
    assert largest_error(pair, name) > 100 * TOLERANCE


@pytest.mark.parametrize("fault", ["normed embeddings", "a factor and a softcap"])
def test_muse_s_assistant_has_the_plain_tables_of_its_target(fault: str) -> None:
    """Muse norms its embeddings and bounds its logits; its assistant does neither."""
    name = "muse-glimmer-assistant"
    pair = load_published("mlx", name)
    if fault == "normed embeddings":
        import mlx.core as mx

        embed = pair.drafter.output.embed
        pair.drafter.output.embed = lambda tokens: mx.fast.rms_norm(embed(tokens), None, 1e-6)
    else:
        settings = read_config(published(name).parent / "muse-target")["text_config"]
        config = pair.drafter_model.config
        object.__setattr__(config, "output_multiplier", settings["output_multiplier"])
        object.__setattr__(config, "softcap", settings["final_logit_softcapping"])
    assert largest_error(pair, name) > 100 * TOLERANCE


def test_features_of_gemma_4_s_embeddings_are_scaled(tmp_path: Path) -> None:
    """Layer -1 of a drafter for Gemma 4 is what the first layer of the target reads."""
    pytest.importorskip("mlx_lm")
    shutil.copytree(published("gemma4-dspark"), tmp_path / "drafter", copy_function=shutil.copy)
    edit_config(tmp_path / "drafter", lambda config: config.update(target_layer_ids=[-1, 2, 4]))
    target = published("gemma4-dspark").parent / "gemma4-target"
    pair = loader("mlx")(target, tmp_path / "drafter", FLOAT32)
    with SequenceSession(pair, drafts=True) as sequence:
        sequence.extend([3, 5, 7])
        last = np.array(sequence.state.context_arrays()[-1])  # the others are projected already
    tensors = read_tensors(target)
    (table,) = (x for name, x in tensors.items() if name.endswith("embed_tokens.weight"))
    np.testing.assert_allclose(last[-1, :64], 8 * table[7], rtol=1e-6)
