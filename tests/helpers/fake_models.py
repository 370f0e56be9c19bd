"""A target that follows a script, a drafter and a head that know the script, and decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from treeflash.config import METHODS, DecodeConfig, SamplingConfig
from treeflash.decoding.interfaces import Backend, Pass, Prefill, TableOptions, Verify
from treeflash.decoding.loop import Step
from treeflash.decoding.sampling import Noise, SampledTokens, SamplingParams, sample
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.testing.comparisons import steps_of

DRAFTING = tuple(method for method in METHODS if DecodeConfig(method=method).drafts)
BUDGETS = (1, 2, 16, 64, 256)
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "temperature": SamplingConfig(temperature=1, seed=1),
    "top-k": SamplingConfig(temperature=1, top_k=5, seed=2),
    "top-p": SamplingConfig(temperature=1.2, top_p=0.8, seed=2**64 - 1),
    "min-p": SamplingConfig(temperature=1, min_p=0.1, seed=2**63),
    "all": SamplingConfig(temperature=1.5, top_k=12, top_p=0.95, min_p=0.02, seed=5),
}
# Exceeded with probability 0.001 at 30 degrees of freedom.
CHI_SQUARE_LIMIT = 59.70

Logits = Callable[[Sequence[int]], np.ndarray]
Proposal = Callable[[Sequence[int], int, int], TransitionTable]
DraftNoise = list[tuple[int, Noise | None]]
DEPTHS = 5


@dataclass(eq=False)
class FakeState:
    """The state of a sequence: its tokens."""

    logits_of: Logits
    drafts: bool
    tokens: list[int] = field(default_factory=list)
    closed: bool = False
    nbytes = 0
    needs_snapshots = False

    @property
    def length(self) -> int:
        return len(self.tokens)

    def restorable(self, length: int) -> int:
        return min(length, self.length)

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeVerifier:
    """A target that is a function of the sequence so far."""

    keys: list[tuple[int, list[int]]] = field(default_factory=list)

    def run(self, work: Sequence[Prefill | Verify]) -> Pass:
        sampled = [
            self._verify(item.state, item.tree, item.params)
            if isinstance(item, Verify)
            else self._extend(item.state, item.token_ids, item.params)
            for item in work
        ]
        return Pass(sampled, rows={x.state: x.tree for x in work if isinstance(x, Verify)})

    def _extend(
        self, state: FakeState, token_ids: Sequence[int], params: SamplingParams | None
    ) -> SampledTokens | None:
        *before, last = token_ids
        state.tokens += before
        sampled = None
        if params is not None:
            sampled = self._verify(state, DraftTree.root_only(last), params)
        state.tokens.append(last)
        return sampled

    def _verify(self, state: FakeState, tree: DraftTree, params: SamplingParams) -> SampledTokens:
        assert (params.keys is None) == params.sampling.greedy
        if params.keys is not None:
            assert params.keys.shape == (len(tree), 2)
            following = (tree.positions(state.length) + 1).tolist()
            self.keys += zip(following, params.keys.tolist(), strict=True)
        return sample(self._logits(state, tree), params)

    def logits(self, trees: Sequence[tuple[FakeState, DraftTree]]) -> Pass:
        return Pass(logits=[self._logits(*each) for each in trees], rows=dict(trees))

    def commit(self, verified: Pass, paths: Sequence[tuple[FakeState, np.ndarray]]) -> None:
        for state, path in paths:
            tree = verified.rows.pop(state)  # a tree is committed once
            assert path[0] == 0
            assert (tree.parents[path[1:]] == path[:-1]).all()
            state.tokens += tree.tokens[path].tolist()

    def _logits(self, state: FakeState, tree: DraftTree) -> np.ndarray:
        sequences: list[list[int]] = []
        for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
            sequences.append([*(state.tokens if parent < 0 else sequences[parent]), token])
        return np.array([state.logits_of(each) for each in sequences], np.float32)


def noise_of(blocks: Sequence[list[int]], noise: Noise | None) -> DraftNoise:
    """The position after each block's root, and the noise of the tokens drafted from there on."""
    parts = [None] * len(blocks) if noise is None else noise.split(len(blocks))
    return list(zip(map(len, blocks), parts, strict=True))


@dataclass
class FakeDrafter:
    """Proposes from the committed sequence and the root."""

    backend: FakeBackend
    noise: DraftNoise = field(default_factory=list)

    def draft(
        self, roots: Sequence[tuple[FakeState, int]], depths: int | None = None
    ) -> list[list[int]]:
        assert all(state.drafts for state, _ in roots)
        return [[*state.tokens, root] for state, root in roots]

    def marginals(
        self, blocks: Sequence[list[int]], options: TableOptions
    ) -> list[TransitionTable]:
        assert options.temperature == 0.5
        self.noise += noise_of(blocks, options.noise)
        return [self.backend.propose(block, 1, options.k) for block in blocks]


@dataclass
class FakeHead:
    propose: Proposal
    rows: list[int | None] = field(default_factory=list)
    noise: DraftNoise = field(default_factory=list)

    def transitions(
        self, blocks: Sequence[list[int]], options: TableOptions
    ) -> list[TransitionTable]:
        assert options.temperature == 0.5
        self.noise += noise_of(blocks, options.noise)
        self.rows.append(options.rows)
        return [self.propose(block, options.m, options.k) for block in blocks]


class FakeBackend:
    """Any function as the target, any function as the drafter."""

    name = device = dtype = inexact = "fake"

    def __init__(
        self, logits: Logits, propose: Proposal, vocab_size: int, max_positions: int = 1000
    ) -> None:
        self.logits, self.propose = logits, propose
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.drafter_config: Any = SimpleNamespace(depths=DEPTHS, has_marginals=True)
        self.verifier = FakeVerifier()
        self.drafter = FakeDrafter(self)
        self.head: FakeHead | None = FakeHead(propose)
        self.states: list[FakeState] = []

    def open(self, capacity: int, *, drafts: bool) -> FakeState:
        self.states.append(FakeState(self.logits, drafts))
        return self.states[-1]

    def state_nbytes(self, capacity: int, *, drafts: bool) -> int:
        return 0

    def check_trees(self) -> None:
        pass


def scripted(script: Sequence[int], *, right: int = 5, max_positions: int = 1000) -> FakeBackend:
    """A target that continues every sequence with the script, and a drafter that knows it.

    The draft's first child is the script's token for `right` depths of five, then a wrong one.
    """
    vocab_size = 100

    def token_at(position: int) -> int:
        return script[position] if position < len(script) else 99

    def logits(sequence: Sequence[int]) -> np.ndarray:
        return np.eye(vocab_size)[token_at(len(sequence))]

    def propose(sequence: Sequence[int], m: int, k: int) -> TransitionTable:
        tokens = np.array([[token_at(len(sequence) + d), 98] for d in range(5)], np.int32)
        tokens[right:] = [97, 98]
        log_probs = np.tile(np.array([[-0.1, -3]], np.float32), (5, 1))
        return TransitionTable.from_marginals(tokens[:, :k], log_probs[:, :k])

    return FakeBackend(logits, propose, vocab_size, max_positions)


SCRIPT = list(range(10, 60))
PROMPT = SCRIPT[:4]


def config_of(**settings: Any) -> DecodeConfig:
    return DecodeConfig(**({"draft_temperature": 0.5, "method": "ddtree", "budget": 6} | settings))


def run(backend: Backend, prompt: Sequence[int] = PROMPT, **settings: Any) -> list[Step]:
    return steps_of(backend, prompt, config_of(**settings))
