"""Base classes and helpers for backends.

`BaseState` keeps the books of a sequence's state; `BaseBackend` holds a target with its drafter;
the `OneByOne...` classes make the three roles from methods that handle one sequence at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from treeflash.config import LoadConfig
from treeflash.decoding.images import PrefillImages, PromptPositions
from treeflash.decoding.interfaces import (
    ARHead,
    Backend,
    Block,
    Export,
    ImageProcessor,
    Pass,
    Prefill,
    SequenceState,
    StateArrays,
    TableOptions,
    Verify,
)
from treeflash.decoding.passed_checks import PassedChecks
from treeflash.decoding.probe import ImageSample, check_exact, check_images, check_trees
from treeflash.decoding.sampling import SampledTokens, sample
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.config import DrafterShape
from treeflash.errors import ConfigError, UnsupportedModelError

R = TypeVar("R")
T = TypeVar("T")

MAX_SNAPSHOTS, NEWEST_SNAPSHOTS = 4, 2
"""Snapshots that a sequence keeps, and the newest among them: the end of its latest prompt and the
last before. The others are spread over the prompt."""


class Snapshots(Generic[R]):
    """The latest snapshots, by length. States are never changed in place, so nothing is copied."""

    def __init__(self) -> None:
        self._states: dict[int, R] = {}

    def __iter__(self) -> Iterator[R]:
        return iter(self._states.values())

    def take(self, length: int, states: R) -> None:
        """Keep the states at a length, which no earlier snapshot exceeds."""
        self._states[length] = states
        if len(self._states) > MAX_SNAPSHOTS:
            lengths = sorted(self._states)
            older = lengths[: MAX_SNAPSHOTS + 1 - NEWEST_SNAPSHOTS]
            gaps = np.diff([0, *older])
            # The snapshot that is dropped is the nearest to the one before it, and so the least
            # missed.
            del self._states[older[int(np.argmin(gaps))]]

    def longest(self, length: int) -> int:
        """Return the longest length up to `length` that has a snapshot; 0 if there is none."""
        return max((n for n in self._states if n <= length), default=0)

    def get(self, length: int) -> R:
        return self._states[length]

    def truncate(self, length: int) -> None:
        self._states = {n: states for n, states in self._states.items() if n <= length}

    def copy(self, length: int) -> Snapshots[R]:
        """Copy the snapshots up to a length, for a fork."""
        new: Snapshots[R] = Snapshots()
        new._states = dict(self._states)
        new.truncate(length)
        return new


class KVCache(Protocol):
    """The members of a KV cache that `BaseState` uses.

    Only a backend that stores states needs `export` and `load`.
    """

    @property
    def length(self) -> int:
        """Committed positions."""

    @property
    def nbytes(self) -> int:
        """Device memory, bytes."""

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on, if there are any."""

    def read(self) -> NDArray[np.float32]:
        """Read the (layers, 2, kv_heads, length, head_dim) committed keys and values."""

    def export(self, first: int, stop: int) -> StateArrays:
        """Copy what the cache has of the positions first .. stop - 1, and no later token."""

    def load(self, arrays: StateArrays, length: int) -> None:
        """Add positions that `export` copied; there are `length` afterwards."""

    def close(self) -> None:
        """Give the memory back."""


K = TypeVar("K", bound=KVCache)


@dataclass(frozen=True, eq=False)
class Unprojected:
    """Outputs of the captured layers at positions that were decoded one by one.

    They are projected to features when the drafter reads them, all at once: a product of many rows
    takes about as long as one of a single row, and while drafting pauses it reads none.
    """

    rows: Any  # (n, layers * hidden_size) of a backend's arrays

    @property
    def nbytes(self) -> int:
        return int(self.rows.nbytes)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Unprojected:
        return Unprojected(self.rows[part])


def rows_of(part: Any) -> Any:
    """Return the array of a part of a context: features, or what they are computed from."""
    return part.rows if isinstance(part, Unprojected) else part


def with_rows(part: Any, change: Callable[[Any], Any]) -> Any:
    """Return a part of a context with a changed array."""
    return Unprojected(change(part.rows)) if isinstance(part, Unprojected) else change(part)


class BaseState(ABC, Generic[K, R]):
    """A `SequenceState` from KV caches, unread features and the states of recurrent layers.

    A backend defines `copy`. If states share memory, it also defines `shared_nbytes` and
    `shareable_nbytes`. If it runs targets with recurrent layers, it also defines
    `recurrent_states`, `restore_recurrent` and `recurrent_arrays`. If it stores states, it defines
    `to_host` and `from_host`, and with recurrent layers `export_recurrent` and `load_recurrent`.

    Args:
        kv_cache: the target's.
        drafter: the drafter's KV cache; None if the sequence is not drafted for.
        initial: the states of the target's recurrent layers before the first position; None if the
            target has no recurrent layers.

    Attributes:
        context: arrays of (n, ...) features, or `Unprojected` ones, in order, of the committed
            positions that the drafter has not read yet.
        snapshots: states of recurrent layers at earlier lengths.
        tokens: of the committed positions.
        images: of the prompt that is being run; None if it has none.
        positions: the rotary positions. Every sequence runs a part of its prompt, at least the last
            token, which sets them.
    """

    def __init__(self, kv_cache: K, drafter: K | None, initial: R | None = None) -> None:
        self.kv_cache = kv_cache
        self.drafter = drafter
        self.initial = initial
        self.context: list[Any] = []
        self.snapshots: Snapshots[R] = Snapshots()
        self.tokens: list[int] = []
        self.images: PrefillImages | None = None
        self.positions = PromptPositions()

    @abstractmethod
    def copy(self, length: int, capacity: int, recurrent: R | None) -> Self:
        """Fork a state with copies of the first `length` positions of KV caches and context.

        `recurrent` are the states of recurrent layers after these positions.
        """

    def recurrent_states(self) -> R | None:
        """Return the recurrent layers' states after the last position; no array changes later."""
        return None

    def restore_recurrent(self, states: R) -> None:
        """Replace the states of the recurrent layers."""
        raise NotImplementedError

    def recurrent_arrays(self) -> Iterable[Any]:
        """Return the arrays of the recurrent layers' states, the snapshots included."""
        return ()

    def to_host(self, x: Any) -> NDArray[Any]:
        """Return the bits of an array of the device; see `StateArrays`."""
        raise NotImplementedError

    def copies_end(self) -> Callable[[], object]:
        """Return a function that waits for the copies that `to_host` has begun."""
        return lambda: None

    def from_host(self, x: NDArray[Any]) -> Any:
        """Return the array of the device that `to_host` read."""
        raise NotImplementedError

    def export_recurrent(self, states: R) -> StateArrays:
        """Return the states of the recurrent layers by name."""
        raise NotImplementedError

    def load_recurrent(self, arrays: StateArrays) -> R:
        """Load the states of the recurrent layers that `export_recurrent` named."""
        raise NotImplementedError

    def export_features(self, parts: Sequence[Any]) -> StateArrays:
        """Return the parts of a context by their numbers; `NUMBER.outputs` is not projected."""
        return {
            f"{n}.outputs" if isinstance(part, Unprojected) else f"{n}": self.to_host(rows_of(part))
            for n, part in enumerate(parts)
        }

    def load_features(self, arrays: StateArrays) -> list[Any]:
        """Load the parts of a context that `export_features` numbered."""
        parts: dict[int, Any] = {}
        for name, x in arrays.items():
            number, _, kind = name.partition(".")
            rows = self.from_host(x)
            parts[int(number)] = Unprojected(rows) if kind else rows
        return [parts[n] for n in sorted(parts)]

    @property
    def length(self) -> int:
        return self.kv_cache.length

    @property
    def read_length(self) -> int:
        return self.length if self.drafter is None else self.drafter.length

    @property
    def nbytes(self) -> int:
        drafter = self.drafter.nbytes if self.drafter is not None else 0
        arrays = (*self.context, *self.recurrent_arrays())
        return self.kv_cache.nbytes + drafter + arrays_nbytes(arrays)

    @property
    def shared_nbytes(self) -> int:
        return 0

    def shareable_nbytes(self, length: int) -> int:
        return 0

    @property
    def needs_snapshots(self) -> bool:
        return self.initial is not None

    def snapshot(self) -> None:
        if (states := self.recurrent_states()) is not None:
            self.snapshots.take(self.length, states)

    def restorable(self, length: int) -> int:
        if self.initial is None or length >= self.length:
            return min(length, self.length)
        return self.snapshots.longest(length)

    def fork(self, length: int, capacity: int) -> Self:
        new = self.copy(length, capacity, self._recurrent_at(length))
        new.snapshots = self.snapshots.copy(length)
        new.tokens = self.tokens[:length]
        return new

    def export(self, first: int, stop: int, *, end: bool) -> Export:
        parts = {"target": self.kv_cache.export(first, stop)}
        if self.drafter is not None:
            read = max(first, min(stop, self.drafter.length))
            parts["drafter"] = self.drafter.export(first, read)
            parts["features"] = self.export_features(self.context_before(stop, first))
        if end and self.initial is not None:
            states = self._recurrent_at(stop)
            assert states is not None
            parts["recurrent"] = self.export_recurrent(states)
        copies = {f"{part}.{name}": x for part, found in parts.items() for name, x in found.items()}
        return Export(copies, self.copies_end())

    def append(self, token_ids: Sequence[int], arrays: StateArrays) -> None:
        parts: dict[str, StateArrays] = {"target": {}, "drafter": {}, "features": {}}
        for name, x in arrays.items():
            part, _, name = name.partition(".")
            parts.setdefault(part, {})[name] = x
        length = self.length + len(token_ids)
        self.kv_cache.load(parts["target"], length)
        self.tokens += token_ids
        if self.drafter is not None:
            features = self.load_features(parts["features"])
            read = len(token_ids) - sum(map(len, features))
            self.drafter.load(parts["drafter"], self.drafter.length + read)
            self.context += features
        if "recurrent" in parts:
            self.restore_recurrent(self.load_recurrent(parts["recurrent"]))

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on, to a length that can be restored."""
        length = min(length, self.length)
        self.rollback(length, self._recurrent_at(length))

    def rollback(self, length: int, recurrent: R | None) -> None:
        """Drop the positions from `length` on, after which the recurrent layers had these states.

        Also after a forward pass that failed, when no snapshot was taken before.
        """
        if recurrent is not None:
            self.restore_recurrent(recurrent)
        self.snapshots.truncate(length)
        self.kv_cache.truncate(length)
        del self.tokens[length:]
        if self.drafter is not None:
            self.context = self.context_before(length)
            self.drafter.truncate(length)

    def begin(self, work: Prefill | Verify) -> None:
        """Note the images of the prompt that is to be run, if it has any."""
        images = work.images if isinstance(work, Prefill) else None
        if images is None:
            self.images = None
        elif self.images is None or self.images.prompt is not images:
            self.images = PrefillImages(images)
            self.positions = PromptPositions(images.positions, images.shift)

    def rotary_positions(self, tokens: DraftTree | Sequence[int]) -> NDArray[np.int32]:
        """Return the rotary positions of new nodes or tokens: (n,), or (3, n) of different axes."""
        if isinstance(tokens, DraftTree):
            return tokens.positions(self.length) + np.int32(self.positions.shift)
        positions = self.positions.rows(self.length, self.length + len(tokens))
        has_axes = self.positions.axes is not None and self.has_features(tokens)
        return positions if has_axes else positions[0]

    def has_features(self, tokens: DraftTree | Sequence[int]) -> bool:
        """Return whether some of a prompt's next tokens stand for features, as no node does."""
        if self.images is None or isinstance(tokens, DraftTree):
            return False
        return bool(self.images.prompt.is_feature[self.length : self.length + len(tokens)].any())

    def chunk_size(self, size: int) -> int:
        """Return how many tokens to run next, about `size`; see `PromptImages.chunk_end`."""
        if self.images is None:
            return size
        return self.images.prompt.chunk_end(self.length, size) - self.length

    def context_before(self, length: int, first: int = 0) -> list[Any]:
        """Return the context of the positions below `length`, without those below `first`."""
        assert self.drafter is not None
        parts, start = [], self.drafter.length
        for part in self.context:
            rows = part[max(first - start, 0) : max(length - start, 0)]
            if len(rows):
                parts.append(rows)
            start += len(part)
        return parts

    def close(self) -> None:
        self.kv_cache.close()
        if self.drafter is not None:
            self.drafter.close()
        if self.initial is not None:
            self.restore_recurrent(self.initial)
        self.context, self.snapshots, self.tokens = [], Snapshots(), []

    def read_kv_cache(self) -> NDArray[np.float32]:
        """Read the committed keys and values of the target, for tests."""
        return self.kv_cache.read()

    def read_drafter_kv_cache(self) -> NDArray[np.float32]:
        """Read the keys and values of the drafter, for tests."""
        assert self.drafter is not None
        return self.drafter.read()

    def read_recurrent_states(self) -> list[NDArray[np.float32]]:
        """Read the states of the target's recurrent layers, for tests."""
        return []

    def _recurrent_at(self, length: int) -> R | None:
        """Return the states of the recurrent layers at a length that can be restored."""
        if self.initial is None or length >= self.length:
            return self.recurrent_states()
        return self.snapshots.get(length) if length else self.initial


def arrays_nbytes(arrays: Iterable[Any]) -> int:
    """Return the memory of arrays, each counted once however often it occurs, bytes."""
    return sum(array.nbytes for array in distinct(arrays))


def distinct(items: Iterable[T]) -> list[T]:
    """Return objects without repetitions; objects that are equal are not the same."""
    return list({id(item): item for item in items}.values())


S = TypeVar("S", bound=BaseState[Any, Any])


def project_contexts(
    states: Iterable[BaseState[Any, Any]],
    project: Callable[[Any], Any],  # (n, layers * hidden_size) outputs to (n, hidden_size) features
    concatenate: Callable[[list[Any]], Any],  # joins arrays along the first axis
) -> None:
    """Project what the contexts of sequences have unprojected, in one product."""
    places = [
        (state.context, i)
        for state in states
        for i, part in enumerate(state.context)
        if isinstance(part, Unprojected)
    ]
    if places:
        features = project(concatenate([context[i].rows for context, i in places]))
        end = 0
        for context, i in places:
            first, end = end, end + len(context[i])
            context[i] = features[first:end]


MAX_READ = 2048
"""Positions of a sequence that a block drafter reads at once. All of a long prompt would take more
memory than is left beside keys and values."""


def unread_parts(state: BaseState[Any, Any], most: int) -> Iterator[list[Any]]:
    """Yield the unread context of a drafter, `most` positions at a time, but for the last part.

    A part counts as read when the next one is asked for.
    """
    assert state.drafter is not None
    while (end := state.drafter.length + most) < state.length:
        yield state.context_before(end)
        rest = state.context_before(state.length, end)
        state.drafter.length, state.context = end, rest


@contextmanager
def undone_on_failure(states: Iterable[BaseState[Any, Any]]) -> Iterator[None]:
    """Take back what the calls inside commit to states if one of them fails."""
    before = [(state, state.length, state.recurrent_states()) for state in states]
    try:
        yield
    except Exception:
        for state, length, recurrent in before:
            state.rollback(length, recurrent)
        raise


def note_drafted(states: Iterable[Any]) -> None:
    """Note that the drafter has read all committed positions of states, once a draft is complete.

    What a draft writes behind them is scratch: the next context overwrites it.
    """
    for state in states:
        state.drafter.length, state.context = state.length, []


@dataclass(frozen=True, eq=False)
class Outputs:
    """The outputs of the layers that the drafter reads, at all rows of a pass over the layers.

    A `Pass` has several of these where its sequences could not run together.
    """

    layers: Any


@dataclass(frozen=True, eq=False)
class PassRows(Generic[S]):
    """The rows of one sequence in a pass: its tree or new tokens, from which a path is committed.

    `Pass.rows` has them by state.
    """

    state: S
    outputs: Outputs
    first: int  # index of the first row in the outputs
    tokens: NDArray[np.int32]  # (n,)
    # (n, hidden_size) embeddings of the tokens, with features of images in place of the tokens that
    # stand for them; None if none does
    merged: Any = None
    written: Any = None  # what else a commit needs, such as what recurrent layers wrote


@dataclass(frozen=True, eq=False)
class CommittedPath(Generic[S]):
    """Rows of which a path is committed: (a,) int32 nodes, the root first."""

    rows: PassRows[S]
    nodes: NDArray[np.int32]

    @classmethod
    def whole(cls, rows: PassRows[S]) -> CommittedPath[S]:
        """Return the path of new tokens, all of which are committed."""
        return cls(rows, np.arange(len(rows.tokens), dtype=np.int32))

    @classmethod
    def of_pass(
        cls, verified: Pass, paths: Iterable[tuple[S, NDArray[np.int32]]]
    ) -> list[CommittedPath[S]]:
        """Return the arguments of a `commit` as paths, if `Pass.rows` has rows by state."""
        return [cls(verified.rows[state], nodes) for state, nodes in paths]

    @property
    def state(self) -> S:
        return self.rows.state

    @property
    def tokens(self) -> list[int]:
        tokens: list[int] = self.rows.tokens[self.nodes].tolist()
        return tokens


def by_outputs(paths: Iterable[CommittedPath[S]]) -> list[list[CommittedPath[S]]]:
    """Group paths whose features are projected together, without sequences that draft nothing."""
    groups: dict[Outputs, list[CommittedPath[S]]] = {}
    for path in paths:
        if path.state.drafter is not None:
            groups.setdefault(path.rows.outputs, []).append(path)
    return list(groups.values())


UNQUANTISED_BITS = 16
"""The number of `LoadConfig.draft_bits` that keeps a drafter as it is."""
ONLY_BACKENDS = {
    **dict.fromkeys(("compile", "threads"), ("cpu", "cuda")),
    **dict.fromkeys(("device_map", "memory_gb"), ("cuda",)),
    "wired": ("mlx",),
}
"""Settings of `LoadConfig` that only some backends have, with the names of these backends."""
OPTIONAL = ("adapter", "bits", "draft_window", "exact")
"""Settings of `LoadConfig` that a backend may lack."""


def check_settings(
    config: LoadConfig,
    backend: str,
    *,
    supported: Collection[str] = (),
    draft_bits: Sequence[int] = (),
    kv_bits: Sequence[int] = (),
    inexact: Sequence[str] = (),
) -> None:
    """Raise a ConfigError for settings that a backend lacks, so that it ignores none of them.

    A backend has the `OPTIONAL` settings that are `supported`. It quantises drafters, and keys and
    values, to these numbers of bits; its exact mode does not support the `inexact` settings. What
    else a `LoadConfig` has is a device, a data type, or a hint that a backend may ignore.
    """
    for name, only in ONLY_BACKENDS.items():
        if getattr(config, name) and backend not in only:
            noun = "backends" if len(only) > 1 else "backend"
            raise ConfigError(f"{name} is supported only by the {' and '.join(only)} {noun}")
    for name in OPTIONAL:
        if getattr(config, name) and name not in supported:
            raise ConfigError(f"{name} is not supported by the {backend} backend")
    for name in inexact:
        if config.exact and getattr(config, name):
            raise ConfigError(f"exact mode does not support {name}; remove one of them")
    for name, numbers in {"draft_bits": tuple(draft_bits), "kv_bits": tuple(kv_bits)}.items():
        unquantised = (UNQUANTISED_BITS,) if name == "draft_bits" else ()
        if (number := getattr(config, name)) in (None, *numbers, *unquantised):
            continue
        if not numbers:
            raise ConfigError(f"{name} is not supported by the {backend} backend")
        choices = (*numbers, *unquantised)
        wanted = choices[0] if len(choices) == 1 else f"one of {choices}"
        raise ConfigError(f"{name} must be {wanted} on the {backend} backend, got {number}")


class BaseBackend:
    """The members of a `Backend` that follow from its target and its drafter.

    A backend adds `name`, `device`, `device_name`, `verifier`, `drafter` and `open`. If its KV
    caches have more columns than positions, it also defines `columns`.

    Attributes:
        target: has `dtype`, `vocab_size`, `max_positions`, `column_nbytes` (keys and values of one
            position in all layers, bytes) and `states_nbytes` (recurrent states of one sequence);
            and perhaps a `processor` of images, or why it takes none.
        drafter_model: the weights of the drafter, with their `config`; None without a drafter.
    """

    stores_states = False

    def __init__(self, target: Any, drafter_model: Any, head: ARHead | None) -> None:
        self.target = target
        self.drafter_model = drafter_model
        self.head = head
        self.dtype = str(target.dtype).rpartition(".")[2]
        self.inexact: str | None = (
            "equal to plain decoding, except at ties of float32 rounding"
            if self.dtype == "float32"
            else "not exact mode: tokens can differ at near-ties of half precision"
        )
        self.vocab_size: int = target.vocab_size
        self.max_positions: int = target.max_positions
        self.drafter_config: DrafterShape | None = drafter_model.config if drafter_model else None
        # `check_images` replaces it.
        self.images: ImageProcessor | str = "the backend does not run images of its model type"
        if isinstance(reason := getattr(target, "processor", None), str):
            self.images = reason
        self._trees: bool | UnsupportedModelError = False  # whether they were checked, or the error
        self.passed = PassedChecks()  # the checks that need not run again

    def check_exact(self) -> None:
        """Say that the backend is exact, and that it runs draft trees.

        Raises an UnsupportedModelError if it is not exact.
        """
        if "exact" not in self.passed:
            check_exact(cast(Backend, self))
            self.passed.add("exact")
        self.inexact, self._trees = None, True

    def check_trees(self) -> None:
        if self._trees is False:
            try:
                if "trees" not in self.passed:
                    check_trees(cast(Backend, self))
                    self.passed.add("trees")
                self._trees = True
            except UnsupportedModelError as error:
                self._trees = error
        if isinstance(self._trees, UnsupportedModelError):
            raise self._trees

    def check_images(self, processor: ImageProcessor, samples: Sequence[ImageSample]) -> None:
        """Take images from now on, if the target passes the check of `probe`."""
        try:
            if "images" not in self.passed:
                check_images(cast(Backend, self), *samples)
                self.passed.add("images")
            self.images = processor
        except UnsupportedModelError as error:
            self.images = str(error)

    def columns(self, capacity: int) -> int:
        """Return the columns that a KV cache allocates for `capacity` positions."""
        return capacity

    def state_nbytes(self, capacity: int, *, drafts: bool) -> int:
        """Return the size of KV caches, recurrent states and their snapshots, bytes."""
        nbytes: int = self.columns(capacity) * self.target.column_nbytes
        nbytes += (1 + MAX_SNAPSHOTS) * self.target.states_nbytes
        if drafts and (config := self.drafter_config):
            columns = self.columns(capacity + config.scratch_rows)
            nbytes += columns * config.column_size * (4 if self.dtype == "float32" else 2)
        return nbytes


class OneByOneVerifier(ABC):
    """`TreeVerifier` from a forward pass over one tree and the commit of one path.

    States are `BaseState`s, so that a call that fails in the middle of its commits can be undone.
    """

    @abstractmethod
    def forward(self, state: Any, tree: DraftTree) -> tuple[NDArray[np.float32], Any]:
        """Run a tree under the committed positions; commit nothing.

        New tokens of a prompt come as a chain. Returns the (n, vocab) logits at the nodes, and what
        `commit_one` needs to commit some of them.
        """

    @abstractmethod
    def commit_one(self, state: Any, outputs: Any, path: NDArray[np.int32]) -> None:
        """Keep the keys and values of a path; `outputs` is what `forward` returned for its tree.

        If `state.drafter` is not None, the features of the path are also added to `state.context`.
        """

    def run(self, work: Sequence[Prefill | Verify]) -> Pass:
        sampled: list[SampledTokens | None] = []
        rows: dict[SequenceState, PassRows[BaseState[Any, Any]]] = {}
        prompts: list[CommittedPath[BaseState[Any, Any]]] = []
        for item in work:
            if isinstance(item, Verify):
                logits, rows[item.state] = self._forward(item.state, item.tree)
            else:
                chain = DraftTree.chain(np.array(item.token_ids, np.int32))
                logits, found = self._forward(item.state, chain)
                prompts.append(CommittedPath.whole(found))
                logits = logits[-1:]
            sampled.append(None if item.params is None else sample(logits, item.params))
        self._commit(prompts)
        return Pass(sampled, rows=rows)

    def commit(self, verified: Pass, paths: Sequence[tuple[Any, NDArray[np.int32]]]) -> None:
        self._commit(CommittedPath.of_pass(verified, paths))

    def logits(self, trees: Sequence[tuple[SequenceState, DraftTree]]) -> Pass:
        found = [self._forward(state, tree) for state, tree in trees]
        return Pass(logits=[x for x, _ in found], rows={rows.state: rows for _, rows in found})

    def _forward(
        self, state: Any, tree: DraftTree
    ) -> tuple[NDArray[np.float32], PassRows[BaseState[Any, Any]]]:
        logits, outputs = self.forward(state, tree)
        return logits, PassRows(state, Outputs(outputs), 0, tree.tokens)

    def _commit(self, paths: Sequence[CommittedPath[BaseState[Any, Any]]]) -> None:
        with undone_on_failure(path.state for path in paths):
            for path in paths:
                self.commit_one(path.state, path.rows.outputs.layers, path.nodes)
                path.state.tokens += path.tokens


class OneByOneDrafter(ABC):
    """`Drafter` from a draft for one sequence; a subclass also defines `log_probs`."""

    @abstractmethod
    def draft_one(self, state: Any, root: int, depths: int | None) -> Block:
        """Compute one entry of `Drafter.draft`.

        The drafter reads `state.context`, whose first row belongs to position
        `state.drafter.length`, and then calls `note_drafted`.
        """

    @abstractmethod
    def marginals_one(self, block: Block, options: TableOptions) -> TransitionTable:
        """Compute one entry of `Drafter.marginals`, such as `logit_tables.marginal_table`.

        The options have the noise of the block.
        """

    def draft(
        self, roots: Sequence[tuple[SequenceState, int]], depths: int | None = None
    ) -> list[Block]:
        return [self.draft_one(state, root, depths) for state, root in roots]

    def marginals(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:
        return list(map(self.marginals_one, blocks, options.split(len(blocks))))


class OneByOneHead(ABC):
    """`ARHead` from the transitions of one block; a subclass also defines `log_probs`."""

    @abstractmethod
    def transitions_one(self, block: Block, options: TableOptions) -> TransitionTable:
        """Compute one entry of `ARHead.transitions`, such as `logit_tables.head_table`.

        The options have the noise of the block.
        """

    def transitions(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:
        return list(map(self.transitions_one, blocks, options.split(len(blocks))))
