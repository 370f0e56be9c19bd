"""A target that says a script, a drafter and a head that know it, and decoding with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from treeflash.config import METHODS, DecodeConfig, SamplingConfig
from treeflash.decoding.choices import Choice, Chosen, choose
from treeflash.decoding.decode_text import decode
from treeflash.decoding.gumbel import Noise
from treeflash.decoding.interfaces import Backend, Extension, Verification
from treeflash.decoding.loop import Step
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree

DRAFTING = METHODS[1:]
BUDGETS = (1, 2, 16, 64, 256)
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "temperature": SamplingConfig(temperature=1, seed=1),
    "top-k": SamplingConfig(temperature=1, top_k=5, seed=2),
    "top-p": SamplingConfig(temperature=1.2, top_p=0.8, seed=2**64 - 1),
    "min-p": SamplingConfig(temperature=1, min_p=0.1, seed=2**63),
    "all": SamplingConfig(temperature=1.5, top_k=12, top_p=0.95, min_p=0.02, seed=5),
}
# Exceeded with probability 0.001 at 35 degrees of freedom.
CHI_SQUARE_LIMIT = 66.62

Logits = Callable[[Sequence[int]], np.ndarray]
Proposal = Callable[[Sequence[int], int, int], TransitionTable]
DraftNoise = list[tuple[int, Noise | None]]
DEPTHS = 5


@dataclass
class FakeText:
    """The state of a text is the text."""

    logits_of: Logits
    drafts: bool
    text: list[int] = field(default_factory=list)
    tree: DraftTree | None = None
    closed: bool = False
    nbytes = 0
    needs_snapshots = False

    @property
    def length(self) -> int:
        return len(self.text)

    def restorable(self, length: int) -> int:
        return min(length, self.length)

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeVerifier:
    """A target that is a function of the text so far."""

    keys: list[tuple[int, list[int]]] = field(default_factory=list)

    def run(self, work: Sequence[Extension | Verification]) -> list[Chosen | None]:
        return [
            self._verify(item.state, item.tree, item.choice)
            if isinstance(item, Verification)
            else self._extend(item.state, item.token_ids, item.choice)
            for item in work
        ]

    def _extend(
        self, text: FakeText, token_ids: Sequence[int], choice: Choice | None
    ) -> Chosen | None:
        *before, last = token_ids
        text.text += before
        chosen = None
        if choice is not None:
            chosen = self._verify(text, DraftTree.root_only(last), choice)
        text.text.append(last)
        text.tree = None
        return chosen

    def _verify(self, text: FakeText, tree: DraftTree, choice: Choice) -> Chosen:
        assert (choice.keys is None) == choice.sampling.greedy
        if choice.keys is not None:
            assert choice.keys.shape == (len(tree), 2)
            following = (tree.positions(text.length) + 1).tolist()
            self.keys += zip(following, choice.keys.tolist(), strict=True)
        text.tree = tree
        return choose(self.logits(text, tree), choice)

    def commit(self, paths: Sequence[tuple[FakeText, np.ndarray]]) -> None:
        for text, path in paths:
            assert text.tree is not None, "commit without verify"
            assert path[0] == 0
            assert (text.tree.parents[path[1:]] == path[:-1]).all()
            text.text += text.tree.tokens[path].tolist()
            text.tree = None

    def logits(self, text: FakeText, tree: DraftTree) -> np.ndarray:
        texts: list[list[int]] = []
        for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
            texts.append([*(text.text if parent < 0 else texts[parent]), token])
        return np.array([text.logits_of(each) for each in texts], np.float32)


def noise_of(blocks: Sequence[list[int]], noise: Noise | None) -> DraftNoise:
    """The position after each block's root, and the noise of what is drafted from there on."""
    parts = [None] * len(blocks) if noise is None else noise.split(len(blocks))
    return list(zip(map(len, blocks), parts, strict=True))


@dataclass
class FakeDrafter:
    """Proposes from the committed text and the root."""

    backend: FakeBackend
    noise: DraftNoise = field(default_factory=list)

    def draft(
        self, roots: Sequence[tuple[FakeText, int]], depths: int | None = None
    ) -> list[list[int]]:
        assert all(text.drafts for text, _ in roots)
        return [[*text.text, root] for text, root in roots]

    def marginals(
        self,
        blocks: Sequence[list[int]],
        k: int,
        temperature: float,
        noise: Noise | None = None,
    ) -> list[TransitionTable]:
        assert temperature == 0.5
        self.noise += noise_of(blocks, noise)
        return [self.backend.propose(block, 1, k) for block in blocks]


@dataclass
class FakeHead:
    propose: Proposal
    rows: list[int | None] = field(default_factory=list)
    noise: DraftNoise = field(default_factory=list)

    def transitions(
        self,
        blocks: Sequence[list[int]],
        m: int,
        k: int,
        temperature: float,
        *,
        noise: Noise | None = None,
        shortlist: int | None = None,
        rows: int | None = None,
    ) -> list[TransitionTable]:
        assert temperature == 0.5
        self.noise += noise_of(blocks, noise)
        self.rows.append(rows)
        return [self.propose(block, m, k) for block in blocks]


class FakeBackend:
    """Any function as the target, any function as the drafter."""

    name = device = dtype = "fake"

    def __init__(
        self, logits: Logits, propose: Proposal, vocab_size: int, max_positions: int = 1000
    ) -> None:
        self.logits, self.propose = logits, propose
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.drafter_config: Any = SimpleNamespace(depths=DEPTHS)
        self.verifier = FakeVerifier()
        self.drafter = FakeDrafter(self)
        self.head: FakeHead | None = FakeHead(propose)
        self.texts: list[FakeText] = []

    def open(self, capacity: int, *, drafts: bool) -> FakeText:
        self.texts.append(FakeText(self.logits, drafts))
        return self.texts[-1]

    def state_nbytes(self, capacity: int, *, drafts: bool) -> int:
        return 0

    def memory_bytes(self) -> int:
        return 0


def scripted(script: Sequence[int], *, right: int = 5, max_positions: int = 1000) -> FakeBackend:
    """A target that continues every text with the script, and a drafter that knows it.

    The draft's first child is the script's token for `right` depths of five, then a wrong one.
    """
    vocab_size = 100

    def token_at(position: int) -> int:
        return script[position] if position < len(script) else 99

    def logits(text: Sequence[int]) -> np.ndarray:
        return np.eye(vocab_size)[token_at(len(text))]

    def propose(text: Sequence[int], m: int, k: int) -> TransitionTable:
        tokens = np.array([[token_at(len(text) + d), 98] for d in range(5)], np.int32)
        tokens[right:] = [97, 98]
        log_probs = np.tile(np.array([[-0.1, -3]], np.float32), (5, 1))
        return TransitionTable.from_marginals(tokens[:, :k], log_probs[:, :k])

    return FakeBackend(logits, propose, vocab_size, max_positions)


SCRIPT = list(range(10, 60))
PROMPT = SCRIPT[:4]


def config_of(**settings: Any) -> DecodeConfig:
    return DecodeConfig(**({"draft_temperature": 0.5, "method": "ddtree", "budget": 6} | settings))


def run(backend: Backend, prompt: Sequence[int] = PROMPT, **settings: Any) -> list[Step]:
    return list(decode(backend, prompt, config_of(**settings)))


def tokens_of(steps: Sequence[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]
