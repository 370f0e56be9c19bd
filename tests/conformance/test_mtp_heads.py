"""Heads that draft depth by depth: published numbers, usual mistakes, and equality of backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mtp_pairs import SETTINGS, VARIANTS, write_mtp_pair
from numpy.typing import NDArray
from published_drafters import (
    BACKENDS,
    FLOAT32,
    TOLERANCE,
    Plant,
    cases,
    load_published,
    needs_fixtures,
    other,
    setting,
)
from recordings import recording
from scheduled_texts import assert_plain_texts

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.sampling import Noise
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree, build_chain, build_tree
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.drafters import mtp_heads
from treeflash.drafters.folder import read_tensors
from treeflash.errors import CheckpointError, ConfigError
from treeflash.hub import models
from treeflash.reference import mtp_head
from treeflash.registry import loader
from treeflash.testing import comparisons
from treeflash.testing.comparisons import generate, steps_of, tokens_of
from treeflash.testing.models import edit_config
from treeflash.testing.pairs import each_value, pairwise
from treeflash.testing.states import check_storage

NEWER = ("deepspec-eagle3", "eagle3-window", "qwen3_5-mtp-quantised", "speculators-mtp")
PUBLISHED = [
    *((b, f) for b in BACKENDS for f in ("qwen3_5-mtp", "eagle3", "speculators-eagle3")),
    *((b, f) for b in BACKENDS for f in NEWER),
    *((b, f) for b in ("cuda", "mlx") for f in ("qwen3_5-moe-mtp", "glm4_moe-mtp")),
    *(("mlx", f) for f in ("gemma4-assistant", "glm4_moe_lite-mtp", "deepseek_v3-mtp")),
]
LoadPair = Callable[[str, str], Any]
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [1, 1, 2, 3, 5, 8, 13, 21, 12, 11, 10, 9])


def tree_of(parents: list[int], tokens: list[int]) -> DraftTree:
    return DraftTree.from_parents(np.array(tokens, np.int32), np.array(parents, np.int32))


def paths(case: dict[str, Any]) -> list[NDArray[np.int32]]:
    """Return the tokens from the root to each node of the given tree."""
    tree = tree_of(case["tree_parents"], case["tree_tokens"])
    return [np.array(path, np.int32) for path in comparisons.paths(tree)]


def largest_error(pair: Any, name: str) -> float:
    """The largest difference from the published log probabilities, on the chains and trees."""
    worst = 0.0
    for case, arrays in cases(name):
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(case["prompt"])
            block = sequence.draft(case["root"])
            chain = np.array([case["root"], *case["chain"]], np.int32)
            chain = chain[: len(arrays["chain_log_probs"])]
            rows = [*pair.head.log_probs(block, chain)]
            expected = list(arrays["chain_log_probs"])
            if "tree_log_probs" in arrays:
                rows += [pair.head.log_probs(block, path)[-1] for path in paths(case)]
                expected += [*arrays["tree_log_probs"]]
        for row, published in zip(rows, expected, strict=True):
            kept = row[np.isfinite(row)]
            assert len(kept) == len(published)
            worst = max(worst, float(np.abs(kept - published).max()))
    return worst


@needs_fixtures
@pytest.mark.parametrize(("backend", "name"), PUBLISHED)
def test_published_numbers_drafts_and_texts(backend: str, name: str) -> None:
    pair = load_published(backend, name)
    assert largest_error(pair, name) < TOLERANCE
    for case, _ in cases(name):
        tokens = [*case["prompt"], *case["greedy"]]
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(case["prompt"])
            block = sequence.draft(case["root"], len(case["chain"]))
            (table,) = pair.head.transitions([block], TableOptions(m=4, k=4))
            assert build_chain(table, case["root"], 6).tokens[1:].tolist() == case["chain"]
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(case["prompt"])
            lengths = case.get("loop_accepted", [])
            chains = case.get("loop_chains", [None] * len(lengths))
            for chain, accepted in zip(chains, lengths, strict=True):
                root, depths = tokens[sequence.length], len(case["chain"])
                (table,) = pair.head.transitions([sequence.draft(root, depths)], TableOptions(k=4))
                drafted = build_chain(table, root, 6).tokens[1:].tolist()
                following = tokens[sequence.length + 1 :][:depths]
                wrong = [a != b for a, b in zip(drafted, following, strict=False)]
                assert [*wrong, True].index(True) == accepted
                assert chain in (None, drafted)
                sequence.extend(tokens[sequence.length :][: accepted + 1])
        for method, budget in (("treeflash", 16), ("treeflash-chain", 6), ("treeflash", "auto")):
            config = DecodeConfig(method=method, budget=budget, max_tokens=len(case["greedy"]))
            assert generate(pair, case["prompt"], config) == case["greedy"]


@needs_fixtures
@pytest.mark.parametrize("backend", BACKENDS)
def test_tree_of_eagle_2(backend: str) -> None:
    pair = load_published(backend, "eagle3")
    for case, _ in cases("eagle3"):
        published = case["published_tree"]
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(case["prompt"])
            block = sequence.draft(case["root"], 4)
            (table,) = pair.head.transitions([block], TableOptions(m=4, k=4))
        tree = build_tree(table, case["root"], len(published["tokens"]))
        expected = tree_of(published["parents"], published["tokens"])
        assert sorted(comparisons.paths(tree)) == sorted(comparisons.paths(expected))


def feedback(self: Any, x: Any) -> Any:
    return x if self.config.normed_feedback else self.normed("norm", x)


def hidden_first(self: Any, tokens: Any, states: Any) -> Any:
    both = self.normed("hidden_norm", states), self.normed("embedding_norm", self.embed(tokens))
    x = self.linear("input_proj", np.concatenate(both, -1))
    return self.normed("layer.input_layernorm", x), x


def later(self: Any, block: Any, rows: Any, depth: int, tokens: Any, parents: Any) -> Any:
    """Nodes one position too high."""
    keys_and_values, layer = mtp_head.MtpModel.keys_and_values, mtp_head.MtpModel.layer
    try:
        mtp_head.MtpModel.keys_and_values = lambda m, n, y, p: keys_and_values(m, n, y, p + 1)  # type: ignore
        mtp_head.MtpModel.layer = lambda m, r, p, *a: layer(m, r, p + 1, *a)  # type: ignore
        return STEP(self, block, rows, depth, tokens, parents)
    finally:
        mtp_head.MtpModel.keys_and_values, mtp_head.MtpModel.layer = keys_and_values, layer  # type: ignore


def without_the_one(patch: pytest.MonkeyPatch, pair: Any) -> None:
    norms = {n: x - 1 for n, x in pair.drafter_model.tensors.items() if n.endswith("norm.weight")}
    pair.drafter_model.tensors.update(norms)


def no_prompt(self: Any, state: Any, root: int, depths: int | None) -> Any:
    block = DRAFT(self, state, root, depths)
    model, p = self.model, block.keys.shape[1]
    y, residual = model.read(np.array([root], np.int32), state.drafter.hidden[-1:])
    keys, values = model.keys_and_values("layer.", y, np.array([p - 1], np.int32))
    output = model.layer(
        (y, residual), np.array([p - 1], np.int32), keys, values, np.ones((1, 1), np.bool_)
    )
    return replace(block, output=output)


def own_token(self: Any, state: Any, root: int, depths: int | None) -> Any:
    """Row i with token i."""
    state.tokens = [0, *state.tokens[:-1]]
    return DRAFT(self, state, root, depths)


def window_before_the_root(self: Any, block: Any, rows: Any, depth: int, *args: Any) -> Any:
    """Drafted rows that see as far back as the root's row."""
    config = self.model.config
    (size,) = config.sliding_windows
    object.__setattr__(config, "sliding_windows", (size + depth,))
    try:
        return STEP(self, block, rows, depth, *args)
    finally:
        object.__setattr__(config, "sliding_windows", (size,))


STEP, DRAFT = mtp_head.MtpHead._step, mtp_head.MtpDrafter.draft_one
FAULTS: dict[str, tuple[str, Plant]] = {
    "state before the final norm": ("qwen3_5-mtp", setting("target_layer_ids", (3,))),
    "state first": ("qwen3_5-mtp", other(mtp_head.MtpModel, "read", hidden_first)),
    "fed back before the norm": ("qwen3_5-mtp", other(mtp_head.MtpModel, "feedback", feedback)),
    "fed back after the norm": ("eagle3", other(mtp_head.MtpModel, "feedback", feedback)),
    "drafts one position high": ("qwen3_5-mtp", other(mtp_head.MtpHead, "_step", later)),
    "no rows of the prompt": ("qwen3_5-mtp", other(mtp_head.MtpDrafter, "draft_one", no_prompt)),
    "rows with their own token": ("eagle3", other(mtp_head.MtpDrafter, "draft_one", own_token)),
    "features of the layers after": ("eagle3", setting("target_layer_ids", (2, 4, 5))),
    "the other residual": ("speculators-eagle3", setting("normed_residual", False)),
    "the target's rotary base": (
        "eagle3",
        lambda patch, pair: object.__setattr__(
            pair.drafter_model.config, "inv_freq", pair.target.inv_freq[:6]
        ),
    ),
    "norms without the 1": ("qwen3_5-mtp", without_the_one),
    "norms of speculators without the 1": ("speculators-mtp", without_the_one),
    "state first in speculators": (
        "speculators-mtp",
        other(mtp_head.MtpModel, "read", hidden_first),
    ),
    "layer ids of DeepSpec that count the embeddings": (
        "deepspec-eagle3",
        lambda patch, pair: object.__setattr__(
            pair.drafter_model.config,
            "target_layer_ids",
            tuple(i - 1 for i in pair.drafter_model.config.target_layer_ids),
        ),
    ),
    "norms of a side file without their 1": ("qwen3_5-mtp-quantised", without_the_one),
    "a window ignored": ("eagle3-window", setting("sliding_windows", (None,))),
    "a window one longer": ("eagle3-window", setting("sliding_windows", (7,))),
    "a window before the root": (
        "eagle3-window",
        other(mtp_head.MtpHead, "_step", window_before_the_root),
    ),
    "DeepSpec's state fed back after the norm": (
        "deepspec-eagle3",
        other(mtp_head.MtpModel, "feedback", feedback),
    ),
}


@needs_fixtures
@pytest.mark.parametrize("fault", FAULTS)
def test_usual_mistakes(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant = FAULTS[fault]
    pair = load_published("reference", name)
    plant(monkeypatch, pair)
    assert largest_error(pair, name) > 0.05


LATENT_FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "halves of a rotary key as pairs": ("glm4_moe_lite-mtp", "latent", {"interleaved": False}),
    "scores scaled by the plain part alone": ("glm4_moe_lite-mtp", "latent", {"scale": 0.25}),
    "experts of all groups": ("deepseek_v3-mtp", "experts", {"groups": 1}),
}


@needs_fixtures
@pytest.mark.parametrize("fault", LATENT_FAULTS)
def test_usual_mistakes_with_latents(fault: str) -> None:
    name, part, changes = LATENT_FAULTS[fault]
    pair = load_published("mlx", name)
    for key, value in changes.items():
        object.__setattr__(getattr(pair.drafter_config, part), key, value)
    assert largest_error(pair, name) > 0.05


@pytest.fixture(params=SETTINGS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def load_pair(tmp_path_factory: pytest.TempPathFactory) -> LoadPair:
    """Load a kind of pair in a backend, once for all tests."""

    @cache
    def load(backend: str, kind: str) -> Any:
        pytest.importorskip(BACKENDS[backend])
        if backend == "cuda" and "latents" in kind:
            pytest.skip("the cuda backend runs no target with latent attention")
        return loader(backend)(*write_mtp_pair(tmp_path_factory.mktemp(kind), kind), FLOAT32)

    return load


def table_of(pair: Any, sequence: SequenceSession, root: int, noisy: bool = False) -> Any:
    block, noise = sequence.draft(root, 4), None
    if noisy:
        after = sequence.length + np.arange(1, 5, dtype=np.int32)
        noise = Noise.from_positions([(SamplingConfig(temperature=1.0, seed=3), after)])
    (table,) = pair.head.transitions([block], TableOptions(m=5, k=4, noise=noise))
    return block, table


@pytest.mark.sample(4)
@pytest.mark.parametrize("backend", BACKENDS)
def test_siblings_are_invisible_and_rows_of_drafts_are_forgotten(
    backend: str, kind: str, load_pair: LoadPair
) -> None:
    """Every row of a table has the log probabilities of its path alone."""
    pair = load_pair(backend, kind)
    with SequenceSession(pair, drafts=True) as sequence:
        sequence.extend(PROMPTS[0])
        block, table = table_of(pair, sequence, 5)
        for _ in range(2):  # the second time over what the first has left
            block = sequence.draft(5, 4)
            known = {0: [5]}
            for depth in range(table.depths):
                following = {}
                for row, path in known.items():
                    log_probs = pair.head.log_probs(block, np.array(path, np.int32))[-1]
                    tokens = table.tokens[depth, row]
                    np.testing.assert_allclose(
                        table.log_probs[depth, row], log_probs[tokens], atol=TOLERANCE
                    )
                    for token, below in zip(tokens, table.next_row[depth, row], strict=True):
                        if below >= 0:
                            following[int(below)] = [*path, int(token)]
                known = following
            assert len(table.tokens[1]) == 5
            (table,) = pair.head.transitions([block], TableOptions(m=5, k=4))


def test_visible_siblings_fail(load_pair: LoadPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp_head.np, "eye", lambda n, dtype: np.ones((n, n), dtype))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_siblings_are_invisible_and_rows_of_drafts_are_forgotten("reference", "mtp", load_pair)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("backend", "kind", "noisy"), pairwise(("cuda", "mlx"), SETTINGS | VARIANTS, (False, True))
)
def test_tables_of_several_sequences_equal_the_reference(
    backend: str, kind: str, noisy: bool, load_pair: LoadPair
) -> None:
    pair, reference = load_pair(backend, kind), load_pair("reference", kind)

    def tables(pair: Any) -> list[Any]:
        sequences = [SequenceSession(pair, drafts=True) for _ in PROMPTS]
        for sequence, prompt in zip(sequences, PROMPTS, strict=True):
            sequence.extend(prompt)
        made = []
        # The second comes after different new tokens. For these two no choice is a near-tie.
        for root in (4, 17):
            blocks = pair.drafter.draft([(s.state, root) for s in sequences], 4)
            samplings = [SamplingConfig(temperature=1.0, seed=i) for i in range(len(sequences))]
            after = [s.length + np.arange(1, 5, dtype=np.int32) for s in sequences]
            noise = Noise.from_positions(list(zip(samplings, after, strict=True)))
            options = TableOptions(m=5, k=4, noise=noise if noisy else None)
            made += pair.head.transitions(blocks, options)
            for n, sequence in enumerate(sequences, 1):
                sequence.extend([root, *range(n)])
        return made

    for actual, expected in zip(tables(pair), tables(reference), strict=True):
        np.testing.assert_array_equal(actual.tokens, expected.tokens)
        np.testing.assert_array_equal(actual.next_row, expected.next_row)
        np.testing.assert_allclose(actual.log_probs, expected.log_probs, atol=TOLERANCE)


@pytest.mark.sample(4)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_after_forks_and_truncations(backend: str, kind: str, load_pair: LoadPair) -> None:
    """A shorter state with other tokens drafts as a fresh one."""
    pair = load_pair(backend, kind)
    first, second = list(PROMPTS[2]), [7, 3]
    with SequenceSession(pair, drafts=True) as old:
        old.extend(first[:6])
        old.state.snapshot()
        old.draft(first[6])
        old.extend(first[6:])
        old.draft(2)
        forks = [old.state.fork(length, 64) for length in (6, len(first))]
        old.state.truncate(6)
        for state, length in zip([*forks, old.state], (6, len(first), 6), strict=True):
            session = SequenceSession(pair, drafts=True)
            session.state = state
            session.extend(second)
            _, table = table_of(pair, session, 4)
            with SequenceSession(pair, drafts=True) as fresh:
                fresh.extend([*first[:length], *second])
                _, expected = table_of(pair, fresh, 4)
                np.testing.assert_array_equal(table.tokens, expected.tokens)
                np.testing.assert_allclose(table.log_probs, expected.log_probs, atol=TOLERANCE)
                rows, expected_rows = (
                    x.drafter.export(0, x.drafter.length) for x in (state, fresh.state)
                )
                for name, x in expected_rows.items():
                    np.testing.assert_allclose(rows[name], x, atol=TOLERANCE)


@pytest.mark.sample(4)
@pytest.mark.parametrize(("backend", "kind", "read"), pairwise(BACKENDS, SETTINGS, (11, 0)))
def test_stored_states_continue_bit_for_bit(
    backend: str, kind: str, read: int, load_pair: LoadPair
) -> None:
    check_storage(load_pair(backend, kind), read=read)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("backend", "kind", "temperature"), each_value(BACKENDS, SETTINGS, (0.0, 1.0))
)
def test_texts_equal_plain_decoding(
    backend: str, kind: str, temperature: float, load_pair: LoadPair
) -> None:
    pair, drafting = load_pair(backend, kind), (("treeflash", 12), ("treeflash-chain", 5))
    assert_plain_texts(pair, PROMPTS, *drafting, temperature=temperature, max_tokens=12)


def test_methods_of_block_drafters_are_refused(load_pair: LoadPair, tmp_path: Path) -> None:
    pair = load_pair("reference", "eagle3")
    for method in ("dflash", "ddtree"):
        with pytest.raises(ConfigError, match="with an MTP or EAGLE-3 head use method treeflash"):
            steps_of(pair, [1, 2], DecodeConfig(method=method))
    for backend in BACKENDS:
        drafter: Any = load_pair(backend, "eagle3").drafter
        for refused in (
            partial(drafter.marginals, [0], TableOptions(k=4)),
            partial(drafter.log_probs, 0),
        ):
            with pytest.raises(
                ConfigError, match="with an MTP or EAGLE-3 head use method treeflash"
            ):
                refused()
    with pytest.raises(ConfigError, match="draft_window is not supported with MTP"):
        loader("reference")(*write_mtp_pair(tmp_path, "eagle3"), LoadConfig(draft_window=8))


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    target, head = write_mtp_pair(tmp_path, "eagle3")
    edit_config(head, lambda config: config.update(mystery=3))
    with pytest.raises(CheckpointError, match="mystery = 3 is not supported"):
        loader("reference")(target, head, FLOAT32)


def test_a_head_in_a_separate_folder(tmp_path: Path) -> None:
    """The tensors alone, as the one file of the original model that has them."""
    target, _ = write_mtp_pair(tmp_path, "mtp")
    (tmp_path / "sidecar").mkdir()
    for name in ("config.json", "mtp.safetensors"):
        (tmp_path / "sidecar" / name).write_bytes((target / name).read_bytes())
    pair = loader("reference")(target, tmp_path / "sidecar", FLOAT32)
    assert pair.drafter_config.head == "mtp"


def test_norms_stay_float32(tmp_path: Path) -> None:
    """Norms of single features do, too: PyTorch's kernel takes no weights in half precision."""
    torch = pytest.importorskip("torch")
    config = LoadConfig(device="cpu", dtype="bfloat16", exact=False)
    pair: Any = loader("cuda")(*write_mtp_pair(tmp_path, "eagle3-flags"), config)
    norms = {name: x for name, x in pair.drafter_model.state_dict().items() if "norm" in name}
    assert {"norm.weight", "fc_norm.0.weight"} <= norms.keys()
    assert {x.dtype for x in norms.values()} == {torch.float32}


@pytest.mark.parametrize("backend", ["cuda", "mlx"])
def test_the_biases_of_routers_stay_float32(backend: str, tmp_path: Path) -> None:
    """They differ by little: rounded, other experts would run for most tokens."""
    pytest.importorskip(BACKENDS[backend])
    config = LoadConfig(device="cpu", dtype="bfloat16", exact=False)
    target, head = write_mtp_pair(tmp_path, "glm")
    pair: Any = loader(backend)(target, head, config)
    stored = read_tensors(head)["model.layers.4.mlp.gate.e_score_correction_bias"]
    assert pair.drafter_model.layer.mlp.gate.correction.bias.tolist() == stored.tolist()


def test_own_head_is_the_drafter_of_last_resort(tmp_path: Path) -> None:
    target, _ = write_mtp_pair(tmp_path, "mtp")
    assert models.resolve_drafter("self", str(target)) == target
    assert models.resolve_drafter(None, str(target)) == target
    (target / "mtp.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no MTP head"):
        models.resolve_drafter("self", str(target))
    with pytest.raises(CheckpointError, match="no published drafter is known"):
        models.resolve_drafter(None, str(target))


def test_state_nbytes_covers_the_states(load_pair: LoadPair) -> None:
    pair = load_pair("reference", "mtp")
    config = pair.drafter_config
    assert isinstance(config, mtp_heads.MtpConfig)
    columns = 10 + config.scratch_rows
    size = 2 * config.num_key_value_heads * config.head_dim + config.hidden_size
    plain = pair.state_nbytes(10, drafts=False)
    assert pair.state_nbytes(10, drafts=True) - plain == 4 * columns * size
    with SequenceSession(pair, drafts=True) as sequence:
        sequence.extend(PROMPTS[0])
        sequence.draft(5)
        rows = len(PROMPTS[0]) * size - (size - config.hidden_size)  # but the root's row
        assert sequence.state.drafter.nbytes == 4 * rows


@pytest.mark.parametrize("backend", ["cuda", "mlx"])
def test_the_size_of_weights_has_a_vocabulary_of_the_heads_own(
    backend: str, tmp_path: Path
) -> None:
    pytest.importorskip(BACKENDS[backend])
    target, head = write_mtp_pair(tmp_path, "eagle3")
    pair = loader(backend)(target, head, FLOAT32)
    size = pair.weights_bytes
    pair.drafter_model.own.lm_head = None
    stored = read_tensors(head)["lm_head.weight"]
    assert size - pair.weights_bytes == 4 * stored.size > 0


def test_the_budget_auto_learns_the_price_of_a_depth(load_pair: LoadPair) -> None:
    pair = load_pair("reference", "eagle3")
    config = DecodeConfig(method="treeflash", budget="auto", max_tokens=24)
    plain = generate(pair, PROMPTS[0], replace(config, method="ar"))
    # Plain decoding is slow, so a depth is nearly free; then fast, so that none pays.
    for seconds, pays in ((10.0, True), (1e-6, False)):
        budgets = AdaptiveBudgets(VerifyCosts({1: seconds, 8: seconds, 16: seconds}))
        budget = budgets.get("treeflash", pair)
        budget.pace(1).depth_s.append(0.01)
        seen = dict.fromkeys(range(1, 9), 9.0)
        budget.acceptance.reached, budget.acceptance.passed = dict(seen), dict(seen)
        with recording(pair.drafter, "draft") as drafts:
            steps = list(decode(pair, Request(prompt_ids=PROMPTS[0], config=config), budgets))
        _, depths = drafts[0]
        assert depths == (8 if pays else 1)
    assert tokens_of(steps) == plain
