"""What a backend implements: a target that verifies trees, a drafter, and its AR head.

NumPy arrays and plain Python cross this boundary. `Features` and `Block` are handles on device
data that the core carries from one call to the next and never looks into.

A text is decoded by one `TreeVerifier` and one `Drafter`, which hold its state; the weights
belong to the `Backend` and are shared by all texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import DrafterConfig, LoadConfig, SamplingConfig
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree

Features: TypeAlias = Any
"""Context features of consecutive positions, on the device: outputs of the target layers that the
drafter reads, or what it makes of them."""

Block: TypeAlias = Any
"""A drafted block: the drafter's hidden states of S positions and the root, on the device."""


class TreeVerifier(Protocol):
    """The target, at work on one text. Starts empty; `length` positions are committed."""

    @property
    def length(self) -> int:
        """Committed positions, 0 .. length - 1. The next root stands at position `length`."""

    def prefill(
        self,
        token_ids: Sequence[int],
        sampling: SamplingConfig,
        uniforms: NDArray[np.float64] | None,
    ) -> tuple[int, Features]:
        """Run the target over more tokens of the text, commit them, choose what follows.

        Args:
            token_ids: at least one; they take positions length, length + 1, ...
            sampling: how to choose.
            uniforms: (1,) in [0, 1), for the token that follows; None when greedy.

        Returns:
            The token chosen after the last one, and the features of all of them; None for the
            features of a verifier made without.

        Raises:
            NumericalError: the logits are not finite.
        """

    def verify(
        self,
        tree: DraftTree,
        sampling: SamplingConfig,
        uniforms: NDArray[np.float64] | None,
    ) -> NDArray[np.int32]:
        """Run the target over a tree in one forward pass and choose a token at every node.

        Node i stands at position length + depths[i] and sees the committed positions, its
        ancestors and itself. Nothing is committed; a second call replaces the first.

        Args:
            tree: n nodes.
            sampling: how to choose.
            uniforms: (n,) in [0, 1), for the token that follows each node; None when greedy.

        Returns:
            (n,) int32; what `treeflash.decoding.sampling.choose` gives for the target's logits.

        Raises:
            NumericalError: the logits are not finite.
        """

    def commit(self, path: NDArray[np.int32]) -> Features:
        """Keep the nodes of a path of the tree verified last, and drop the others.

        Args:
            path: (a,) int32 node indices, 0 first, each the parent of the next.

        Returns:
            The features of those a positions; None from a verifier made without.
        """

    def logits(self, tree: DraftTree) -> NDArray[np.float32]:
        """Like `verify`, but (n, vocab) raw logits: for tests and analysis, not for decoding."""

    def keys_values(self) -> NDArray[np.float32]:
        """The committed keys and values, for tests: (layers, 2, kv_heads, length, head_dim)."""

    def close(self) -> None:
        """Release what the text holds; the verifier must not be used afterwards.

        The decode loop calls it when a text ends, however it ends. A second call does nothing.
        """


class Drafter(Protocol):
    """The one-shot drafter, at work on one text."""

    def draft(self, features: Features, root: int) -> Block:
        """Take in newly committed positions, then propose a block after them.

        Args:
            features: of the positions committed since the last call, as the verifier gave them;
                those of earlier ones went through `extend`.
            root: the token at the next position; it opens the block, S - 1 masks follow.

        Returns:
            Hidden states of the block. They are valid until the next call.
        """

    def extend(self, features: Features) -> None:
        """Take in newly committed positions without proposing anything after them.

        Args:
            features: of the positions committed since the last call, this or `draft`.
        """

    def marginals(self, block: Block, k: int, temperature: float) -> TransitionTable:
        """The `k` most probable tokens of each depth, whatever was drafted before (DDTree).

        Args:
            block: from `draft`.
            k: children; the whole vocabulary where that is smaller.
            temperature: divides the logits.
        """

    def log_probs(self, block: Block) -> NDArray[np.float32]:
        """Like `marginals`, but every token's, in nats and at temperature 1.

        For tests and analysis, not for decoding.

        Args:
            block: from `draft`.

        Returns:
            (S - 1, vocab); row i is depth i + 1.
        """

    def keys_values(self) -> NDArray[np.float32]:
        """The context's keys and values, for tests: (layers, 2, kv_heads, length, head_dim)."""


class ARHead(Protocol):
    """The head that conditions a block on previous tokens. It has no state."""

    def transitions(
        self,
        block: Block,
        m: int,
        k: int,
        temperature: float,
        *,
        shortlist: int | None = None,
        rows: int | None = None,
    ) -> TransitionTable:
        """The `k` most probable tokens of each depth after each of `m` previous tokens.

        The previous tokens of depth d >= 2 are the `m` of highest marginal logit at depth d - 1,
        best first; depth 1 has the root alone (TreeFlash, section 3).

        Args:
            block: from `Drafter.draft`.
            m: previous-token candidates; the whole vocabulary where that is smaller.
            k: children; the whole vocabulary where that is smaller.
            temperature: divides the logits, after the head.
            shortlist: score only that many tokens, those most probable by their marginal at any
                depth; ties by token id. Previous tokens and children are then of the shortlist,
                and the rest of the vocabulary keeps the probability that the depth's marginal
                gives it. None, or the whole vocabulary, is the published head.
            rows: score the children of only that many previous tokens, those of the highest
                marginal log probability over all depths; the root's are always scored. What
                follows a token is drafted about as often as its marginal says, so a tree of n
                nodes has little use for many more than n. None is the published head: all.
        """

    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        """Like `transitions`, but every token's, after one given previous token at each depth.

        In nats and at temperature 1; for tests and analysis, not for decoding.

        Args:
            block: from `Drafter.draft`.
            previous: (S - 1,) int32; previous[i] is the token before depth i + 1, so that
                previous[0] is the root.

        Returns:
            (S - 1, vocab); row i is depth i + 1.
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
    head: ARHead | None
    """None when the drafter has no AR head."""

    def verifier(self, *, features: bool) -> TreeVerifier:
        """A verifier for a new text; `features` says whether a drafter will need them."""

    def drafter(self) -> Drafter:
        """A drafter for a new text. Only where `drafter_config` is not None."""

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
