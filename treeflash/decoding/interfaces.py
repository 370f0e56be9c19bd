"""What a backend implements: a target that verifies trees, a drafter, and its AR head.

NumPy arrays and plain Python cross this boundary. `TextState` and `Block` are handles on device
data that the core passes back and never looks into.

Each role takes a list with one entry per text, and returns one. A backend that handles one text at
a time inherits from the classes of `treeflash.decoding.one_by_one`. A call that raises has changed
no text: it can be repeated with fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import LoadConfig
from treeflash.decoding.choices import Choice, Chosen
from treeflash.decoding.gumbel import Noise
from treeflash.decoding.text_state import TextState
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.drafter_config import DrafterConfig

Block: TypeAlias = Any
"""A drafted block: the root, and the drafter's hidden states of its depths, on the device."""


@dataclass(frozen=True, eq=False)
class Extension:
    """Run the target over more tokens of a text and commit them.

    Attributes:
        state: of the text.
        token_ids: at least one; they take positions length, length + 1, ...
        choice: how to choose the token after the last one; None if it is not needed.
    """

    state: TextState
    token_ids: Sequence[int]
    choice: Choice | None


@dataclass(frozen=True, eq=False)
class Verification:
    """Run the target over a draft tree and choose a token at every node.

    Node i stands at position length + depths[i] and sees the committed positions, its ancestors
    and itself. Nothing is committed; a second verification replaces the first.

    Attributes:
        state: of the text.
        tree: n nodes.
        choice: for n nodes.
    """

    state: TextState
    tree: DraftTree
    choice: Choice


class TreeVerifier(Protocol):
    """The target."""

    def run(self, work: Sequence[Extension | Verification]) -> list[Chosen | None]:
        """One forward pass over the tokens and trees of several texts, each text once.

        Returns:
            Per text: what `treeflash.decoding.choices.choose` gives for the target's logits, at the
            last token of an extension and at every node of a tree; None if there was no choice.

        Raises:
            NumericalError: logits are not finite.
        """

    def commit(self, paths: Sequence[tuple[TextState, NDArray[np.int32]]]) -> None:
        """Keep a path of the tree that was verified last, per text, and drop its other nodes.

        Args:
            paths: states, and (a,) int32 node indices, 0 first, each the parent of the next.
        """

    def logits(self, trees: Sequence[tuple[TextState, DraftTree]]) -> list[NDArray[np.float32]]:
        """(n, vocab) logits at the nodes of each tree: for tests and analysis, not for decoding."""


class Drafter(Protocol):
    """The one-shot drafter."""

    def draft(
        self, roots: Sequence[tuple[TextState, int]], depths: int | None = None
    ) -> list[Block]:
        """Read the features of newly committed positions, then propose a block after them.

        Args:
            roots: states opened for drafting, and the token at the next position of each; it opens
                the block, and S - 1 masks follow.
            depths: how many of the block's D depths are wanted, 1 or more; a small tree has no use
                for the others. None, or more than there are, is all. It changes no depth's output.

        Returns:
            Hidden states of the blocks' first depths, valid until the next call.
        """

    def marginals(
        self, blocks: Sequence[Block], k: int, temperature: float, noise: Noise | None = None
    ) -> list[TransitionTable]:
        """The `k` most probable tokens of each depth, whatever was drafted before (DDTree).

        Args:
            blocks: from one call of `draft`.
            k: children; the whole vocabulary if that is smaller.
            temperature: divides the logits.
            noise: added to the logits before, that of the depths of all blocks in order. The most
                probable tokens are then those that the target is most likely to sample. None adds
                nothing, as for a target that decodes greedily.
        """

    def log_probs(self, block: Block) -> NDArray[np.float32]:
        """Log probabilities of all tokens, in nats and at temperature 1.

        For tests and analysis, not for decoding.

        Args:
            block: from `draft`.

        Returns:
            (D, vocab); row i is depth i + 1. Tokens that cannot be drafted have -inf.
        """


class ARHead(Protocol):
    """The conditional head: it conditions a block on previous tokens, and keeps no state.

    A drafter's format decides which it is: TreeFlash's, the selector of DFlash2, a Markov head of
    DSpark, or a recurrent one (DSpark's `rnn`, Domino). Its log probabilities are those of the
    whole vocabulary. A head that scores a few candidates of a depth (a selector) gives the others
    nothing; its rows keep the probability that the depth's marginal gives to the candidates, so
    that paths of all rows can be compared.
    """

    def transitions(
        self,
        blocks: Sequence[Block],
        m: int,
        k: int,
        temperature: float,
        *,
        noise: Noise | None = None,
        shortlist: int | None = None,
        rows: int | None = None,
    ) -> list[TransitionTable]:
        """The `k` most probable tokens of each depth after each of `m` previous tokens.

        The previous tokens of depth d >= 2 are the `m` of highest marginal logit at depth d - 1,
        best first; depth 1 has the root alone (TreeFlash, section 3).

        A recurrent head depends on all tokens before: a row of its table stands for one path. It
        expands the root, and at each further depth the `m` most probable paths so far, the chain of
        the best child after each token first.

        Args:
            blocks: from one call of `Drafter.draft`.
            m: previous-token candidates; the whole vocabulary if that is smaller.
            k: children; the whole vocabulary if that is smaller.
            temperature: divides the logits, after the head.
            noise: added to all logits, of the marginals and of the head; see `Drafter.marginals`.
            shortlist: score only that many tokens, those most probable by their marginal at any
                depth of the text's block; ties by token id. Previous tokens and children are then
                of the shortlist, and the rest of the vocabulary keeps the probability that the
                depth's marginal gives it. None, or the whole vocabulary, is the published head.
            rows: score the children of only that many previous tokens of each text, those of the
                highest marginal log probability over all depths; the root's are always scored. A
                token is drafted about as often as its marginal says, so a tree of n nodes has
                little use for many more rows than n. None is the published head: all. A recurrent
                head expands at most so many paths at each depth.
        """

    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        """Log probabilities of all tokens after one given previous token at each depth.

        A recurrent head takes them for one path.

        In nats and at temperature 1; for tests and analysis, not for decoding.

        Args:
            block: from `Drafter.draft`.
            previous: (D,) int32; previous[i] is the token before depth i + 1, so that
                previous[0] is the root.

        Returns:
            (D, vocab); row i is depth i + 1. Tokens that cannot be drafted have -inf.
        """


class Backend(Protocol):
    """A target, and a drafter for it, loaded on one device."""

    name: str
    """As registered: `cuda`, `mlx`, `reference`, ..."""
    device: str
    """As the framework names it: `cuda:0`, `cpu`, `gpu`, ..."""
    device_name: str
    """The hardware, such as the GPU's model: measured costs are kept by it."""
    dtype: str
    vocab_size: int
    max_positions: int
    """Positions that the target was made for."""
    drafter_config: DrafterConfig | None
    """None when no drafter was loaded: only plain decoding works then."""

    @property
    def verifier(self) -> TreeVerifier:
        """The target."""

    @property
    def drafter(self) -> Drafter | None:
        """None when no drafter was loaded."""

    @property
    def head(self) -> ARHead | None:
        """None when the drafter has no AR head."""

    def open(self, capacity: int, *, drafts: bool) -> TextState:
        """The empty state of a new text.

        Args:
            capacity: positions that it can hold, those of the tree under verification included.
            drafts: whether it will be drafted for; only with a drafter.
        """

    def state_nbytes(self, capacity: int, *, drafts: bool) -> int:
        """Device memory that such a state will hold, bytes."""

    def memory_bytes(self) -> int:
        """The most memory that the device has held for this process, bytes; 0 if unknown."""


class Loader(Protocol):
    """The entry point of a backend, in the group `treeflash.backends`.

    Its module may also have a function `choose_device(name)`, which raises a BackendError if there
    is no such device. It is called before any model is fetched.
    """

    def __call__(self, target: Path, drafter: Path | None, config: LoadConfig) -> Backend:
        """Load a target folder and, for drafting, a drafter folder.

        Raises:
            BackendError: no such device, or the framework is missing.
            CheckpointError: a folder is damaged, or the two do not fit.
            UnsupportedModelError: the target cannot run a draft tree.
            ConfigError: the backend cannot do what `config` asks.
        """
