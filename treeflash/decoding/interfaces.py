"""The interfaces of a backend: a target that verifies trees, a drafter, and its AR head.

NumPy arrays and plain Python cross this boundary. `SequenceState` and `Block` are handles on device
data that the core passes back and never looks into.

Each role takes a list with one entry per sequence, and returns such a list. A backend that handles
one sequence at a time inherits from the classes of `treeflash.decoding.backend_base`. A call that
raises has changed no sequence: it can be repeated with fewer sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import LoadConfig
from treeflash.decoding.images import PromptImages
from treeflash.decoding.sampling import Noise, SampledTokens, SamplingParams
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.config import DrafterShape

StateArrays: TypeAlias = dict[str, NDArray[Any]]
"""A part of a state by name, bit for bit; uint16 has the bits of bfloat16, which NumPy lacks."""


@dataclass(frozen=True, eq=False)
class Export:
    """A part of a state that a device copies to the host, perhaps beside its other work."""

    begun: StateArrays  # the arrays, in which values may be missing
    wait: Callable[[], object]  # returns when no value is missing; any thread may call it

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.begun.values())

    def arrays(self) -> StateArrays:
        """Return the arrays when they are complete."""
        self.wait()
        return self.begun


class SequenceState(Protocol):
    """The state of one sequence on the device: the KV cache of its committed positions.

    It holds the target's KV cache and, if it was opened for drafting, the drafter's, with the
    features of those committed positions that the drafter has not read yet. Recurrent layers of the
    target keep the state after the last position alone: such a sequence can be forked only at its
    end and where a snapshot was taken. `treeflash.decoding.backend_base.BaseState` implements all
    of it except the copying. Only a backend with `stores_states` needs `export` and `append`.
    """

    @property
    def length(self) -> int:
        """Committed positions, 0 .. length - 1. The next root stands at position `length`."""

    @property
    def nbytes(self) -> int:
        """Device memory that the state holds, bytes, its snapshots included.

        Memory that states share counts for them in equal parts.
        """

    @property
    def shared_nbytes(self) -> int:
        """Bytes among `Backend.state_nbytes` that count for other states, which share them."""

    def shareable_nbytes(self, length: int) -> int:
        """Return the bytes that a fork at this length shares, and so needs no memory for."""

    @property
    def needs_snapshots(self) -> bool:
        """Whether the target has recurrent layers."""

    def snapshot(self) -> None:
        """Store the states of recurrent layers, so that a fork at the present length is possible.

        A few snapshots are kept, the two latest among them. Without recurrent layers it does
        nothing.
        """

    def restorable(self, length: int) -> int:
        """Return the longest length up to `length` at which the state can be forked.

        Without recurrent layers it is the smaller of `length` and the present length. With them it
        is the present length or the length of a snapshot, or 0 if there is none.
        """

    def fork(self, length: int, capacity: int) -> SequenceState:
        """Return a new state with a copy of the first `length` positions, and of their snapshots.

        `length` is one that `restorable` returned; the new state can hold `capacity` positions.
        """

    @property
    def read_length(self) -> int:
        """Committed positions that the drafter has read; all of them if none was to draft."""

    def export(self, first: int, stop: int, *, end: bool) -> Export:
        """Begin to copy the positions first .. stop - 1 to the host; the state may change at once.

        Features of those that the drafter has not read are among the arrays. The `end` of a state
        also has the states of recurrent layers after `stop`, at which the state can be forked.
        """

    def append(self, token_ids: Sequence[int], arrays: StateArrays) -> None:
        """Commit positions that `export` copied, behind the ones that were before them.

        Positions that the drafter has read come before those that it has not read. A state with
        recurrent layers is complete again when an end was appended. A draft must follow at least
        one more token.
        """

    def close(self) -> None:
        """Give the memory back; the state cannot be used any more. Closing twice is harmless."""


Block: TypeAlias = Any
"""A drafted block: the root, and the drafter's hidden states of its depths, on the device.

The blocks of block drafters have the token id of the `root`, for heads that users write.
"""


@dataclass(frozen=True, eq=False)
class Prefill:
    """Run the target over more tokens of a sequence and commit them."""

    state: SequenceState
    token_ids: Sequence[int]  # at least one, at positions length, length + 1 and so on
    # `params` is None if no token is to be sampled after the last one.
    params: SamplingParams | None
    # images of the whole prompt, whose part these tokens are; None if it has none
    images: PromptImages | None = None


@dataclass(frozen=True, eq=False)
class Verify:
    """Run the target over a draft tree and sample a token at every node.

    Node i stands at position length + depths[i] and sees the committed positions, its ancestors and
    itself. Nothing is committed.
    """

    state: SequenceState
    tree: DraftTree
    params: SamplingParams


@dataclass(frozen=True, eq=False)
class Pass:
    """The result of a forward pass of the target, from which paths of its trees can be committed.

    It is complete: a state keeps nothing of a pass but keys and values of the nodes, behind the
    committed positions. Another pass over a sequence overwrites them, and so replaces this one.

    Attributes:
        sampled: per sequence, the result of `treeflash.decoding.sampling.sample` for the target's
            logits after the last token of a prefill or at every node of a tree; None if the prefill
            has no `params`. `TreeVerifier.logits` samples nothing.
        logits: each tree's (n, vocab) logits, if `TreeVerifier.logits` made the pass.
        rows: what the backend needs to commit paths; a handle that the core never looks into.
    """

    sampled: Sequence[SampledTokens | None] = ()
    logits: Sequence[NDArray[np.float32]] = ()
    rows: Any = None


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Sizes, temperature and noise of the tables that `marginals` and `transitions` return.

    Marginals are those with noise, at the temperature. `treeflash.decoding.logit_tables` makes
    tables from logits.

    Attributes:
        k: children of a row; the whole vocabulary if that is smaller.
        m: previous tokens at each depth, 1 by default; the whole vocabulary if that is smaller.
        temperature: divides the logits, after the head and after the noise.
        noise: added to the logits of the marginals and of the head, for the depths of all blocks in
            order. The most probable tokens are then those that the target is most likely to sample.
            None adds nothing, as for a target that decodes greedily. It is left out of comparisons.
        shortlist: number of tokens that an AR head scores, by highest marginal log probability at
            any depth of the block; ties by token id. Previous tokens and children are then from the
            shortlist, and the rest of the vocabulary keeps the probability that the depth's
            marginal gives it: a row's probabilities are the softmax over the shortlist, times the
            probability that the marginal gives to the shortlist. None, or the whole vocabulary, is
            the published head.
        rows: number of previous tokens of a sequence whose children an AR head scores, by highest
            marginal log probability over all depths; the root's children are always scored. A token
            is drafted about as often as its marginal says, so a tree of n nodes has little use for
            many more rows than n. None scores all rows, as the published head does. A recurrent
            head expands at most `rows` paths at each depth.
    """

    k: int
    m: int = 1
    temperature: float = 1.0
    noise: Noise | None = field(default=None, compare=False)
    shortlist: int | None = None
    rows: int | None = None

    def split(self, blocks: int) -> list[TableOptions]:
        """Split the options for each of several blocks alone, with the noise of that block."""
        if self.noise is None:
            return [self] * blocks
        return [replace(self, noise=noise) for noise in self.noise.split(blocks)]


class TreeVerifier(Protocol):
    """The target."""

    def run(self, work: Sequence[Prefill | Verify]) -> Pass:
        """Run one forward pass over the tokens and trees of several sequences, each once.

        Raises:
            NumericalError: the logits are not finite.
        """

    def commit(
        self, verified: Pass, paths: Sequence[tuple[SequenceState, NDArray[np.int32]]]
    ) -> None:
        """Keep a path of the tree that a pass verified for each sequence; drop the other nodes.

        The pass is the last one of these sequences, which may be some of its sequences. A path is
        (a,) int32 node indices, 0 first, each the parent of the next.
        """

    def logits(self, trees: Sequence[tuple[SequenceState, DraftTree]]) -> Pass:
        """Compute each tree's (n, vocab) logits, for probes and analysis; commit nothing."""


class Drafter(Protocol):
    """The one-shot drafter."""

    def draft(
        self, roots: Sequence[tuple[SequenceState, int]], depths: int | None = None
    ) -> list[Block]:
        """Read the features of newly committed positions, then propose a block after them.

        Args:
            roots: states opened for drafting, and the token at the next position of each; the root
                opens the block, and S - 1 mask tokens follow.
            depths: the number of depths to return, at least 1, because a small tree has no use for
                all D depths of the block. None, or more than D, is all. It changes no depth's
                output.

        The blocks are valid until the next call.
        """

    def marginals(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:
        """Return the most probable tokens of each depth, whatever was drafted before (DDTree).

        The blocks are from one call of `draft`; of the options, `m`, `shortlist` and `rows` are not
        used.
        """

    def log_probs(self, block: Block) -> NDArray[np.float32]:
        """Return (D, vocab) log probabilities, in nats and at temperature 1, for analysis.

        Row i is depth i + 1. Tokens that cannot be drafted have -inf.
        """


class ARHead(Protocol):
    """The conditional head: it conditions a block on previous tokens, and keeps no state.

    The drafter's format decides which head it has: TreeFlash's, the selector of DFlash2, a Markov
    head of DSpark, or a recurrent head (DSpark's `rnn`, Domino). Log probabilities are over the
    whole vocabulary. A head that scores only some candidates of a depth (a selector) gives other
    tokens probability 0; its rows sum to the probability that the depth's marginal gives to the
    candidates, so that paths of all rows can be compared.
    """

    def transitions(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:
        """Return the most probable tokens of each depth after each of several previous tokens.

        The blocks are from one call of `Drafter.draft`. The previous tokens of depth d >= 2 are the
        `m` of highest marginal logit at depth d - 1, best first; depth 1 has the root alone
        (TreeFlash, section 3).

        A recurrent head depends on all tokens before: a row of its table stands for one path. It
        expands the root, and at each deeper depth the `m` most probable paths so far, the chain of
        the best child after each token first.
        """

    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return (D, vocab) log probabilities after a given previous token at each depth.

        They are as `Drafter.log_probs`. `previous` are (D,) int32: previous[i] is the token before
        depth i + 1, so previous[0] is the root. A recurrent head takes the tokens as one path.
        """


class ImageProcessor(Protocol):
    """Makes the inputs of a target from a prompt with pictures, on the host, in any thread.

    The caller reads and decodes the pictures, and renders the chat template. A template puts
    `placeholder` where a message has a picture.
    """

    chat_template: str | None
    """The processor's own template; None if it has none, so that the tokenizer's is used."""
    placeholder: str
    """The text that stands for one picture in a rendered prompt."""

    def encode(
        self, text: str, pictures: Sequence[NDArray[np.uint8]]
    ) -> tuple[list[int], PromptImages]:
        """Return the ids of a rendered prompt, and its images.

        Args:
            text: the rendered prompt. A begin token is added only if the tokenizer adds one, and
                the text does not begin with it.
            pictures: (height, width, 3) RGB, at least one, in the order of their placeholders.

        Raises:
            PromptError: the text has another number of placeholders than there are pictures, as a
                user's text that has one would make it; or a picture has a shape that the target
                does not take.
        """


class Backend(Protocol):
    """A target, and a drafter for it, loaded on one device.

    These further members are optional; the functions below tell what the core does without them:

    - `captures`: an int, how many functions were compiled or captured so far. The time of an
      iteration in which it grows is no measurement, so a framework that compiles needs it: the
      adaptive budget would conclude that drafts are slow.
    - `warm_up(max_parallel)` compiles what a server needs; returns the number of functions.
    - `states_nbytes(states)`: the bytes of several states, if that is not the sum over the states.
    - `device_report()`: a `DeviceReport`.
    """

    name: str
    """The registered name, such as `cuda` or `mlx`."""
    device: str
    """The device as the framework names it, such as `gpu`; for a CPU always `cpu`."""
    device_name: str
    """The hardware, such as the GPU's model, by which measured costs are kept."""
    dtype: str
    vocab_size: int
    max_positions: int
    """The target's limit, prompt and new tokens together."""
    inexact: str | None
    """Why a sequence's logits may depend on what is computed together with them; None if they are
    bitwise equal for every tree, batch, prompt chunk, fork and prefix-cache hit."""
    stores_states: bool
    """Whether states have `export` and `append`, so that they can be kept on a disk."""
    drafter_config: DrafterShape | None
    """None when no drafter was loaded, so that only plain decoding works."""
    images: ImageProcessor | str
    """Prepares prompts with images; or why the target takes none, as a clause."""

    @property
    def verifier(self) -> TreeVerifier:
        """The target."""

    @property
    def drafter(self) -> Drafter | None:
        """None when no drafter was loaded."""

    @property
    def head(self) -> ARHead | None:
        """None when the drafter has no AR head."""

    def open(self, capacity: int, *, drafts: bool) -> SequenceState:
        """Open the empty state of a new sequence, which needs a drafter if it `drafts`.

        `capacity` counts positions, the nodes of the tree under verification included.

        Raises a MemoryInUseError, as `SequenceState.fork` does, if a backend has set memory aside
        for states, and the others leave no room in it: the state can be opened when one ends.
        """

    def state_nbytes(self, capacity: int, *, drafts: bool) -> int:
        """Return the bytes that a state opened with these arguments may hold."""

    def check_trees(self) -> None:
        """Check, once, that the target runs draft trees, as `load` does for a drafter.

        A backend with a model of its own may leave that to the suite. Raises an
        UnsupportedModelError if the target does not run them; plain decoding still works.
        """


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """What a backend tells about its device, for `doctor` and the server."""

    facts: Mapping[str, str] = field(default_factory=dict)  # about the machine, by name
    available_bytes: int | None = None  # memory that models and states may take; None if unknown
    weights_bytes: int = 0  # memory that the loaded models take
    others_bytes: int = 0  # memory that other models of the process take
    reserved_bytes: int | None = None  # memory that is set aside for states; None if none is
    batches: bool = True  # whether sequences share forward passes
    # Whether each kernel of the backend is used, and why, by kernel and size. What is said of a
    # kernel in use begins with "used".
    kernels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    # Whole messages, such as a compiler's, about kernels that do not run, by kernel and size.
    messages: Mapping[str, str] = field(default_factory=dict)

    @property
    def free_bytes(self) -> int | None:
        """Memory that is free for the states of the loaded models; None if unknown."""
        if self.reserved_bytes is not None:
            return self.reserved_bytes
        if self.available_bytes is None:
            return None
        taken = self.weights_bytes + self.others_bytes
        return max(int(SAFE_SHARE * self.available_bytes) - taken, 0)


SAFE_SHARE = 0.9
"""Share of the available memory that weights and states may take; a pass needs some too."""


def device_report(backend: Backend) -> DeviceReport:
    """Return what a backend tells; an empty report if it has no method `device_report`."""
    report: DeviceReport = getattr(backend, "device_report", DeviceReport)()
    return report


def states_nbytes(backend: Backend, states: Sequence[tuple[int, bool]]) -> int:
    """Return the bytes that the states of sequences that run together may hold.

    `states` has the arguments of `Backend.state_nbytes` for each of them. In a backend without a
    method `states_nbytes` they hold as much as alone.
    """
    together = getattr(backend, "states_nbytes", None)
    if together is not None:
        return int(together(states))
    return sum(backend.state_nbytes(capacity, drafts=drafts) for capacity, drafts in states)


def warm_up(backend: Backend, max_parallel: int) -> int:
    """Let a backend prepare passes of up to `max_parallel` sequences; return how many it prepared.

    They would otherwise be prepared when they are first needed, while all sequences wait. A backend
    without a method `warm_up` prepares none.
    """
    prepare = getattr(backend, "warm_up", None)
    return 0 if prepare is None else int(prepare(max_parallel))


def count_captures(backend: Backend) -> int:
    """Return how many functions a backend has compiled or captured; 0 without `captures`."""
    return int(getattr(backend, "captures", 0))


class Loader(Protocol):
    """The entry point of a backend, in the group `treeflash.backends`.

    Its module may also have functions that are called before any model is downloaded or read:

    - `check_config(config)` raises a ConfigError for settings of a `LoadConfig` that the backend
      lacks, as `treeflash.decoding.backend_base.check_settings` does; `load` checks them too.
    - `choose_device(name)` raises a BackendError if the device does not exist; None is the
      backend's default.
    - `check_drafter(config)` raises an UnsupportedModelError if the backend cannot run a drafter
      with this `DrafterShape`; then another drafter is looked for.
    - `bits_refusal(config)` returns None if the backend keeps the bits of a GGUF file's weights,
      and else why not, in words; empty if the settings exclude it.
    - `memory_limit()` returns the bytes that models may take, or None: larger ones are refused.
    - `examine_device(config)` returns a `DeviceReport` without any model, for `doctor`.
    """

    def __call__(self, target: Path, drafter: Path | None, config: LoadConfig) -> Backend:
        """Load a target folder and, for drafting, a drafter folder.

        Raises:
            BackendError: the device does not exist, or the framework is not installed.
            CheckpointError: a folder is damaged, or the drafter does not fit the target.
            UnsupportedModelError: the target cannot run a draft tree.
            ConfigError: the backend does not support a setting of `config`.
        """
