"""Published drafters: the numbers, drafts and texts of the published code, and usual mistakes."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from published_drafters import (
    BACKENDS,
    FLOAT32,
    TOLERANCE,
    cases,
    load_published,
    needs_fixtures,
    published,
)

from treeflash.config import DecodeConfig
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree, build_chain, build_tree
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.reference import drafter, drafter_model, mtp_head
from treeflash.reference.mtp_head import MtpDrafter, MtpHead, MtpModel
from treeflash.reference.numerics import attention, rms_norm, rotate, silu, visible
from treeflash.registry import loader
from treeflash.testing import comparisons
from treeflash.testing.comparisons import generate
from treeflash.testing.models import edit_config

EVERYWHERE = (
    *("qwen3_5-mtp", "qwen3_5-mtp-quantised", "speculators-mtp"),
    *("eagle3", "eagle3-window", "deepspec-eagle3", "speculators-eagle3", "speculators-peagle"),
    *("dflash-sinks", "dspark-sinks", "gemma4-dspark-plain", "muse-glimmer-assistant-plain"),
)
NOT_IN_THE_REFERENCE = "qwen3_5-moe-mtp", "glm4_moe-mtp"
ON_MLX = (
    *("gemma4-assistant", "glm4_moe_lite-mtp", "deepseek_v3-mtp"),
    *("gemma4-dspark", "muse-glimmer-assistant"),
)
PUBLISHED = [
    *((backend, name) for backend in BACKENDS for name in EVERYWHERE),
    *((backend, name) for backend in ("cuda", "mlx") for name in NOT_IN_THE_REFERENCE),
    *(("mlx", name) for name in ON_MLX),
]
pytestmark = needs_fixtures


def tree_of(parents, tokens):
    return DraftTree.from_parents(np.array(tokens, np.int32), np.array(parents, np.int32))


def largest_error(pair, name):
    """The largest difference from published log probabilities, of marginals, chains and trees."""
    worst = 0.0
    for case, arrays in cases(name):
        found = []
        expected = []
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(case["prompt"])
            block = sequence.draft(case["root"])
            if "log_probs" in arrays:
                found += [*pair.drafter.log_probs(block)]
                expected += [*arrays["log_probs"]]
            if pair.head is not None:
                drafted = case["chain"] if "chain" in case else case["draft"]
                expected += [*arrays["chain_log_probs"]]
                chain = [case["root"], *drafted][: len(arrays["chain_log_probs"])]
                found += [*pair.head.log_probs(block, np.array(chain, np.int32))]
            if "tree_log_probs" in arrays:
                expected += [*arrays["tree_log_probs"]]
                for path in comparisons.paths(tree_of(case["tree_parents"], case["tree_tokens"])):
                    found.append(pair.head.log_probs(block, np.array(path, np.int32))[-1])
        for row, given in zip(found, expected, strict=True):
            kept = row[np.isfinite(row)]
            assert len(kept) == len(given)
            worst = max(worst, float(np.abs(kept - given).max()))
    return worst


def chain_after(pair, sequence, root, depths):
    """The greedy chain after a root: of the head, or of the marginals."""
    block = sequence.draft(root, depths)
    if pair.head is None:
        (table,) = pair.drafter.marginals([block], TableOptions(k=1))
    else:
        (table,) = pair.head.transitions([block], TableOptions(m=16, k=4))
    return build_chain(table, root, 100)


@pytest.mark.parametrize(("backend", "name"), PUBLISHED)
def test_published_numbers_drafts_and_texts(backend, name):
    pair = load_published(backend, name)
    assert largest_error(pair, name) < TOLERANCE
    chain_method, tree = (
        ("dflash", "ddtree") if pair.head is None else ("treeflash-chain", "treeflash")
    )
    for case, arrays in cases(name):
        tokens = [*case["prompt"], *case["greedy"]]
        depths = len(case["chain"]) if "chain" in case else None
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(case["prompt"])
            chain = chain_after(pair, sequence, case["root"], depths)
            assert chain.tokens[1:].tolist() == case["chain" if depths else "draft"]
            if (logits := arrays.get("chain_confidence_logits")) is not None:
                expected = 1 / (1 + np.exp(-logits))
                np.testing.assert_allclose(chain.confidences[1:], expected, atol=TOLERANCE)
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(case["prompt"])
            lengths = case.get("loop_accepted", [])
            chains = case.get("loop_chains", [None] * len(lengths))
            for expected_chain, accepted in zip(chains, lengths, strict=True):
                drafted = chain_after(pair, sequence, tokens[sequence.length], depths)
                own = drafted.tokens[1:].tolist()
                wrong = [a != b for a, b in zip(own, tokens[sequence.length + 1 :], strict=False)]
                assert [*wrong, True].index(True) == accepted
                assert expected_chain in (None, own)
                sequence.extend(tokens[sequence.length :][: accepted + 1])
        for method, budget in ((chain_method, 6), (tree, 16), (tree, "auto")):
            config = DecodeConfig(method=method, budget=budget, max_tokens=len(case["greedy"]))
            assert generate(pair, case["prompt"], config) == case["greedy"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tree_of_eagle_2(backend):
    pair = load_published(backend, "eagle3")
    for case, _ in cases("eagle3"):
        given = case["published_tree"]
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(case["prompt"])
            block = sequence.draft(case["root"], 4)
            (table,) = pair.head.transitions([block], TableOptions(m=4, k=4))
        tree = build_tree(table, case["root"], len(given["tokens"]))
        expected = tree_of(given["parents"], given["tokens"])
        assert sorted(comparisons.paths(tree)) == sorted(comparisons.paths(expected))


STEP, DRAFT = MtpHead._step, MtpDrafter.draft_one


def setting(name, value, part=None):
    """Give a drafter's configuration, or a part of it, another value."""

    def plant(patch, pair):
        config = pair.drafter_config if part is None else getattr(pair.drafter_config, part)
        made = value(pair, config) if callable(value) else value
        object.__setattr__(config, name, made)

    return plant


def other(owner, name, function):
    """Replace a function of a module, or a method of a class."""
    return lambda patch, pair: patch.setattr(owner, name, function)


def feedback(self, x):
    return x if self.config.normed_feedback else self.normed("norm", x)


def hidden_first(self, tokens, states):
    both = self.normed("hidden_norm", states), self.normed("embedding_norm", self.embed(tokens))
    x = self.linear("input_proj", np.concatenate(both, -1))
    return self.normed("layer.input_layernorm", x), x


def later(self, block, rows, depth, *args):
    """Nodes one position too high."""
    keys_and_values, layer = MtpModel.keys_and_values, MtpModel.layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MtpModel, "keys_and_values", lambda m, n, y, p: keys_and_values(m, n, y, p + 1)
        )
        patch.setattr(MtpModel, "layer", lambda m, r, p, *a: layer(m, r, p + 1, *a))
        return STEP(self, block, rows, depth, *args)


def without_the_one(patch, pair):
    norms = {n: x - 1 for n, x in pair.drafter_model.tensors.items() if n.endswith("norm.weight")}
    pair.drafter_model.tensors.update(norms)


def no_prompt(self, state, root, depths):
    block = DRAFT(self, state, root, depths)
    model, p = self.model, np.array([block.keys.shape[1] - 1], np.int32)
    y, residual = model.read(np.array([root], np.int32), state.drafter.hidden[-1:])
    keys, values = model.keys_and_values("layer.", y, p)
    output = model.layer((y, residual), p, keys, values, np.ones((1, 1), np.bool_))
    return replace(block, output=output)


def own_token(self, state, root, depths):
    """Row i with token i."""
    state.tokens = [0, *state.tokens[:-1]]
    return DRAFT(self, state, root, depths)


def window_before_the_root(self, block, rows, depth, *args):
    """Drafted rows that see as far back as the root's row."""
    config = self.model.config
    (size,) = config.sliding_windows
    object.__setattr__(config, "sliding_windows", (size + depth,))
    try:
        return STEP(self, block, rows, depth, *args)
    finally:
        object.__setattr__(config, "sliding_windows", (size,))


def scaled_sinks(factor):
    """Multiply the sinks; a factor of -inf leaves them out."""

    def plant(patch, pair):
        tensors = pair.drafter_model.tensors
        for name in [name for name in tensors if name.endswith("sink_bias")]:
            left_out = np.full_like(tensors[name], -np.inf)
            tensors[name] = left_out if factor < 0 else factor * tensors[name]

    return plant


def masks_one_position_high(patch, pair):
    """Rotate the rows of P-EAGLE's masks, the last ones, as if they were one position later."""
    masks = pair.drafter_model.config.depths - 1

    def rotated(x, positions, *args):
        return rotate(x, positions + (np.arange(len(positions)) >= len(positions) - masks), *args)

    patch.setattr(drafter_model, "rotate", rotated)


def normed_embeddings(patch, pair):
    import mlx.core as mx

    embed = pair.drafter.output.embed
    patch.setattr(
        pair.drafter.output, "embed", lambda tokens: mx.fast.rms_norm(embed(tokens), None, 1e-6)
    )


def bounded_logits(patch, pair):
    settings = read_config(published("muse-glimmer-assistant").parent / "muse-target")[
        "text_config"
    ]
    config = pair.drafter_model.config
    object.__setattr__(config, "output_multiplier", settings["output_multiplier"])
    object.__setattr__(config, "softcap", settings["final_logit_softcapping"])


FAULTS = {
    "qwen3_5-mtp": {
        "state before the final norm": setting("target_layer_ids", (3,)),
        "state first": other(MtpModel, "read", hidden_first),
        "fed back before the norm": other(MtpModel, "feedback", feedback),
        "drafts one position high": other(MtpHead, "_step", later),
        "no rows of the prompt": other(MtpDrafter, "draft_one", no_prompt),
        "norms without the 1": without_the_one,
    },
    "qwen3_5-mtp-quantised": {"norms of a side file without their 1": without_the_one},
    "speculators-mtp": {
        "norms without the 1": without_the_one,
        "state first": other(MtpModel, "read", hidden_first),
    },
    "eagle3": {
        "fed back after the norm": other(MtpModel, "feedback", feedback),
        "rows with their own token": other(MtpDrafter, "draft_one", own_token),
        "features of the layers after": setting("target_layer_ids", (2, 4, 5)),
        "the target's rotary base": setting("inv_freq", lambda pair, _: pair.target.inv_freq[:6]),
    },
    "speculators-eagle3": {"the other residual": setting("normed_residual", False)},
    "deepspec-eagle3": {
        "layer ids that count the embeddings": setting(
            "target_layer_ids", lambda _, config: tuple(i - 1 for i in config.target_layer_ids)
        ),
        "state fed back after the norm": other(MtpModel, "feedback", feedback),
    },
    "eagle3-window": {
        "a window ignored": setting("sliding_windows", (None,)),
        "a window one longer": setting("sliding_windows", (7,)),
        "a window before the root": other(MtpHead, "_step", window_before_the_root),
    },
    "glm4_moe_lite-mtp": {
        "halves of a rotary key as pairs": setting("interleaved", False, "latent"),
        "scores scaled by the plain part alone": setting("scale", 0.25, "latent"),
    },
    "deepseek_v3-mtp": {"experts of all groups": setting("groups", 1, "experts")},
    "dflash-sinks": {
        "no sinks": scaled_sinks(-np.inf),
        "sinks scaled like scores": scaled_sinks(0.25),
        "causal where the file says false": setting("causal", (True, True)),
    },
    "dspark-sinks": {
        "no sinks": scaled_sinks(-np.inf),
        "no window with use_swa": setting("sliding_windows", (None, None)),
        "a window one shorter": setting("sliding_windows", (5, 5)),
        "slots that see later ones": setting("causal", (False, False)),
    },
    "muse-glimmer-assistant-plain": {
        "sliding layers as causal": setting("causal", (True,) * 3),
        "a window without its end": setting("sliding_windows", (7,) * 3),
    },
    # Muse norms its embeddings and bounds its logits; its assistant does neither.
    "muse-glimmer-assistant": {
        "normed embeddings": normed_embeddings,
        "a factor and a softcap": bounded_logits,
    },
    "gemma4-dspark-plain": {
        "values without a norm": other(
            drafter_model,
            "rms_norm",
            lambda x, weight, eps: x if len(weight) == 1 else rms_norm(x, weight, eps),
        ),
        "scores scaled": other(
            drafter, "attention", lambda q, k, v, mask, *_: attention(q, k, v, mask)
        ),
        "SiLU in the layers": other(drafter_model, "gelu_tanh", silu),
        "embeddings without a factor": setting("input_scale", 1.0),
        "no softcap before the Markov bias": setting("softcap", None),
        "frequencies of the turning channels alone": setting("inv_freq", (1.0, 1e-3, *[0.0] * 6)),
        "a causal block": setting("causal", (True, True)),
    },
    "speculators-peagle": {
        "the mask embedded by the target": lambda patch, pair: pair.drafter_model.vocabulary.pop(
            "embed_tokens.weight"
        ),
        "masks without a state": lambda patch, pair: patch.setitem(
            pair.drafter_model.tensors, "mask_hidden", np.zeros((1, 1, 192), np.float32)
        ),
        "masks one position high": masks_one_position_high,
        "rows that see later ones": other(
            mtp_head, "visible", lambda q, k, w, causal: visible(q, k, w, causal=False)
        ),
    },
}
"""Mistakes, by the drafter that shows them."""


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults]
)
def test_usual_mistakes(name, fault, monkeypatch):
    pair = load_published("mlx" if name in ON_MLX else "reference", name)
    FAULTS[name][fault](monkeypatch, pair)
    assert largest_error(pair, name) > 100 * TOLERANCE


def test_features_of_gemma_4_s_embeddings_are_scaled(tmp_path):
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
