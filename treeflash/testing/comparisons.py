"""Comparisons of the results of two backends, and prompts whose decisions are not close.

Backends add the same numbers in other orders, so their results differ by some 1e-6. If two tokens
are closer than that, either decision is right. The suite takes prompts without such ties, so that
it can ask for equal tokens, trees and paths without exception.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.interfaces import Backend, SequenceState
from treeflash.decoding.loop import Step
from treeflash.decoding.probe import relative_difference
from treeflash.decoding.sampling import position_keys, sample_tokens
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, build_chain, build_tree


def random_tokens(rng: Generator, vocab_size: int, length: int) -> list[int]:
    return [int(token) for token in rng.integers(0, vocab_size, length)]


def text_difference(
    backend: Backend, token_ids: Sequence[int], expected: NDArray[np.float32]
) -> float:
    """Measure how much a text's last (vocab,) logits differ from expected ones.

    It is the larger difference of the text alone and beside another one, NaN if either is.
    """
    with SequenceSession(backend) as text, SequenceSession(backend) as other:
        other.extend(list(token_ids[:3]))
        text.extend(list(token_ids[:-1]))
        last = DraftTree.root_only(token_ids[-1])
        (alone,) = text.logits(last)
        (beside, _) = backend.verifier.logits([(text.state, last), (other.state, last)]).logits
    return float(np.max([relative_difference(x, expected) for x in (alone, beside[0])]))


def random_tree(rng: Generator, root: int, nodes: int, vocab_size: int) -> DraftTree:
    """Build a deep and branching tree whose siblings differ; its log probabilities are all 0."""
    tokens, parents = [root], [-1]
    while len(tokens) < nodes:
        # Half of the nodes extend one of the newest, or the tree would stay shallow.
        newest = max(0, len(tokens) - 3) if rng.random() < 0.5 else 0
        parent = int(rng.integers(newest, len(tokens)))
        token = int(rng.integers(vocab_size))
        if (parent, token) not in zip(parents, tokens, strict=True):
            tokens.append(token)
            parents.append(parent)
    return DraftTree.from_parents(np.array(tokens, np.int32), np.array(parents, np.int32))


def path_to(tree: DraftTree, node: int) -> NDArray[np.int32]:
    """Return the (depth + 1,) int32 nodes from the root down to a node."""
    path = [node]
    while path[-1] > 0:
        path.append(int(tree.parents[path[-1]]))
    return np.array(path[::-1], np.int32)


def chain_to(tree: DraftTree, node: int) -> DraftTree:
    """Build the path to a node as a tree."""
    path = path_to(tree, node)
    return DraftTree.chain(tree.tokens[path], tree.log_probs[path])


TOLERANCE = 5e-5
"""Largest difference of two float32 values of tiny models, absolute and relative: logits, log
probabilities, keys, values. Backends differ by some 1e-6; a wrong position or mask by far more."""
LONG_TOLERANCE = 2e-3
"""The tolerance at positions of thousands, where a float32 angle is off by some 1e-4 radians."""


def assert_close(
    actual: NDArray[np.floating], expected: NDArray[np.floating], *, tolerance: float = TOLERANCE
) -> None:
    """Assert equal types and shapes, and values within a tolerance."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


class Inspectable(SequenceState, Protocol):
    """The additional members that the state of a backend under test must have.

    `treeflash.decoding.backend_base.BaseState` has them all, but a backend with recurrent layers
    defines `read_recurrent_states`.
    """

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on, to a length that `restorable` returned."""

    def read_kv_cache(self) -> NDArray[np.float32]:
        """Read the target's keys and values, (attention layers, 2, kv_heads, length, head_dim)."""

    def read_drafter_kv_cache(self) -> NDArray[np.float32]:
        """Read the drafter's (layers, 2, kv_heads, n, head_dim) cache of the positions it read."""

    def read_recurrent_states(self) -> list[NDArray[np.float32]]:
        """Return the states of the target's recurrent layers after the last position, in order.

        (W - 1, channels) the last inputs of each short convolution of width W, without bias and
        activation, and (heads, key_dim, value_dim) the matrix state, if the layer has one. In
        Mamba-2, B are the keys and x the values. Empty without recurrent layers.
        """


def inspectable(state: SequenceState) -> Inspectable:
    return cast(Inspectable, state)


def assert_equal_states(
    actual: SequenceState, expected: SequenceState, *, tolerance: float = TOLERANCE
) -> None:
    """Compare the target's keys, values and recurrent states of two sequences."""
    states = inspectable(actual), inspectable(expected)
    assert_close(*(state.read_kv_cache() for state in states), tolerance=tolerance)
    for pair in zip(*(state.read_recurrent_states() for state in states), strict=True):
        assert_close(*pair, tolerance=tolerance)


def assert_equal_drafter_caches(
    actual: SequenceState, expected: SequenceState, *, tolerance: float = TOLERANCE
) -> None:
    """Compare the drafter's keys and values of two sequences."""
    states = inspectable(actual), inspectable(expected)
    assert_close(*(state.read_drafter_kv_cache() for state in states), tolerance=tolerance)


def assert_equal_tables(actual: TransitionTable, expected: TransitionTable) -> None:
    """Assert equal tokens and rows wherever a child exists, and close log probabilities."""
    exists = np.isfinite(expected.log_probs)
    np.testing.assert_array_equal(np.isfinite(actual.log_probs), exists)
    for name in ("tokens", "next_row"):
        values = getattr(actual, name)
        assert values.dtype == np.int32
        np.testing.assert_array_equal(values[exists], getattr(expected, name)[exists])
    assert_close(actual.log_probs, expected.log_probs)
    assert (actual.confidences is None) == (expected.confidences is None)
    if actual.confidences is not None and expected.confidences is not None:
        scored = exists.any(-1)
        assert_close(actual.confidences[scored], expected.confidences[scored])


def assert_equal_trees(actual: DraftTree, expected: DraftTree) -> None:
    """Compare two trees: the same nodes in the same order, log probabilities close."""
    for name in ("tokens", "parents", "depths"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
    assert_close(actual.log_probs, expected.log_probs)
    assert (actual.confidences is None) == (expected.confidences is None)
    if actual.confidences is not None and expected.confidences is not None:
        assert_close(actual.confidences, expected.confidences)


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    """Return the tokens from the root down to each node."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def assert_equal_steps(actual: Sequence[Step], expected: Sequence[Step]) -> None:
    """Compare two runs: the same tree, accepted path and tokens in every iteration."""
    for a, b in zip(actual, expected, strict=True):
        assert (a.tree is None) == (b.tree is None)
        if a.tree is not None and b.tree is not None:
            assert_equal_trees(a.tree, b.tree)
            np.testing.assert_array_equal(a.path, b.path)
        assert a.tokens == b.tokens
        assert a.finish_reason == b.finish_reason


def tokens_of(steps: Iterable[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]


def steps_of(backend: Backend, prompt: Sequence[int], config: DecodeConfig) -> list[Step]:
    return list(decode(backend, Request(prompt_ids=prompt, config=config)))


def generate(backend: Backend, prompt: Sequence[int], config: DecodeConfig) -> list[int]:
    return tokens_of(steps_of(backend, prompt, config))


def prompt_of(backend: Backend, seed: int = 0) -> list[int]:
    """Draw a random prompt of seven tokens."""
    return random_tokens(np.random.default_rng(seed), backend.vocab_size, 7)


def prompted(
    backends: Iterable[Backend],
    prompt: Sequence[int],
    *,
    drafts: bool = False,
    capacity: int = 1024,
) -> list[SequenceSession]:
    sequences = [SequenceSession(x, drafts=drafts, capacity=capacity) for x in backends]
    for sequence in sequences:
        sequence.extend(prompt)
    return sequences


MARGIN = 1e-5
ATTEMPTS = 300


def settled_generation(reference: Backend, config: DecodeConfig) -> tuple[list[int], list[Step]]:
    """Find a short random prompt that the reference decodes without a close decision; its steps."""
    rng = np.random.default_rng(0)
    for _ in range(ATTEMPTS):
        prompt = random_tokens(rng, reference.vocab_size, int(rng.integers(1, 12)))
        steps = steps_of(reference, prompt, config)
        if _is_settled(reference, prompt, config, steps):
            return prompt, steps
    raise AssertionError(f"none of {ATTEMPTS} prompts is settled; choose other weights")


def is_settled_choice(
    logits: NDArray[np.float32], sampling: SamplingConfig, keys: NDArray[np.uint32] | None
) -> bool:
    """Return whether a little noise on the (n, vocab) logits changes none of the sampled tokens."""
    rng = np.random.default_rng(0)
    chosen = sample_tokens(logits, sampling, keys)
    noise = rng.uniform(-4 * MARGIN, 4 * MARGIN, (6, *logits.shape)).astype(np.float32)
    return all(np.array_equal(chosen, sample_tokens(logits + x, sampling, keys)) for x in noise)


def is_settled_table(table: TransitionTable) -> bool:
    """Return whether the children of every row differ clearly in probability."""
    with np.errstate(invalid="ignore"):
        gaps = -np.diff(table.log_probs.astype(np.float64), axis=-1)
    return not (gaps < MARGIN).any()


def _is_settled(
    reference: Backend, prompt: Sequence[int], config: DecodeConfig, steps: Sequence[Step]
) -> bool:
    sequence = SequenceSession(reference)
    # The last token of the prompt is run as a tree of one node: its logits are then seen too.
    if prompt[:-1]:
        sequence.extend(prompt[:-1])
    first = DraftTree.root_only(prompt[-1]), np.zeros(1, np.int32), None
    verified = [(step.tree, step.path, step.table) for step in steps if step.tree is not None]
    for tree, path, table in [first, *verified]:
        assert path is not None
        if table is not None and not _is_settled_tree(table, int(tree.tokens[0]), config):
            return False
        if tree.matches is not None and not _is_settled_merge(tree, tree.matches):
            return False
        keys = None
        if not config.sampling.greedy:
            keys = position_keys(config.sampling.seed, tree.positions(sequence.length + 1))[path]
        if not is_settled_choice(sequence.logits(tree)[path], config.sampling, keys):
            return False
        sequence.commit(path)
    return True


def _is_settled_tree(table: TransitionTable, root: int, config: DecodeConfig) -> bool:
    build = build_chain if config.drafts_chain else build_tree
    assert isinstance(config.budget, int)
    tree = build(table, root, config.budget + 1)  # the first node left out must differ as well
    follows_parent = tree.parents[1:] == np.arange(len(tree) - 1)
    return bool((follows_parent | (-np.diff(tree.log_probs) > MARGIN)).all())


def _is_settled_merge(tree: DraftTree, matches: NDArray[np.int32]) -> bool:
    """Return whether neighbours differ clearly in probability, or are both copies."""
    copies = (matches[1:-1] > 0) & (matches[2:] > 0)
    follows_parent = tree.parents[2:] == np.arange(1, len(tree) - 1)
    gaps = -np.diff(tree.log_probs[1:])
    return bool((copies | follows_parent | (gaps > MARGIN)).all())
