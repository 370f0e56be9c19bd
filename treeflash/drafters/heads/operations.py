"""What the mathematics of drafters needs of an array library, and the kinds of heads.

A head or layer is written once, for PyTorch and MLX. Its class imports neither: a backend makes a
module of it by adding its own module class as a second base, and its operations as the attribute
`ops`. So parameters and children are registered, quantised, packed and trained as in any other
module of the framework, and children are built by the backend. The NumPy reference has heads and
layers of its own, so that a mistake here is compared with something that does not share it.

Arrays are of the backend's framework. Methods and operators that both frameworks share, such as
`reshape`, `mean(keepdims=True)`, `@` and slices, need no operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from numpy.typing import NDArray

from treeflash.drafters.config import DrafterConfig, DrafterShape

Array: TypeAlias = Any
Module: TypeAlias = Any
"""A module of the framework, which is called with arrays."""
Rows: TypeAlias = Any
"""(n,) indices of rows; None pairs rows in order, where a backend has that."""
OutputStage: TypeAlias = Any
"""The backend's `treeflash.decoding.output_stage.OutputStage` of the drafter."""


@dataclass(frozen=True, kw_only=True)
class Builders:
    """Constructors of the layers of a head, whose weights are loaded afterwards."""

    linear: Callable[..., Module]  # (in, out, bias=True)
    # (size, out, bias): the layer is called with two vectors of a size, and the second's rows.
    pair_linear: Callable[..., Module]
    embedding: Callable[[int, int], Module]  # (rows, size)
    rms_norm: Callable[[int, float], Module]  # (size, eps)
    float32_norm: Callable[[int, float], Module]  # an RMS norm whose weights stay float32
    float32_bias: Callable[[int], Module]  # adds a bias that stays float32 to a float32 array
    activation: Callable[[], Module]  # SiLU, which has a number in a list but no weights
    # (size, state_size): the GRU has no biases, and is called with inputs and states.
    gru: Callable[[int, int], Module]
    mlp: Callable[[DrafterShape], Module]  # SwiGLU of a configuration's sizes, or Gemma 4's GELU
    # (size, width, experts): SwiGLUs, called with (n, size) vectors, and (n, k) indices and weights
    # of the experts whose weighted sum in float32 is returned.
    experts: Callable[[int, int, int], Module]
    # Called with (..., n, heads, head_dim) vectors and a rotation, gives `layers.by_head` of them.
    rotary: Callable[[DrafterShape], Module]
    children: Callable[[list[Module]], Any]
    named_children: Callable[[dict[str, Module]], Any]
    parameter: Callable[..., Array]  # (*shape)
    module: Callable[[Any], Any]  # makes the framework's class of a class that is written once


@dataclass(frozen=True, kw_only=True)
class Operations(Builders):
    """An array library, as heads and layers use it."""

    # These are NumPy's functions.
    concatenate: Callable[[list[Array], int], Array]
    stack: Callable[[list[Array], int], Array]
    broadcast_to: Callable[[Array, tuple[int, ...]], Array]
    einsum: Callable[..., Array]
    sigmoid: Callable[[Array], Array]
    silu: Callable[[Array], Array]
    softmax: Callable[[Array], Array]  # over the last axis
    tanh: Callable[[Array], Array]

    float32: Callable[[Array], Array]
    split: Callable[[Array, int], Any]  # cuts the last axis into equal parts
    take: Callable[[Array, Rows], Array]  # selects rows by their indices
    gather: Callable[[Array, Array], Array]  # selects from the last axis, in each row by indices
    top: Callable[[Array, int], Array]  # (n, k) indices of the largest in each row, descending
    amax: Callable[[Array, int], Array]  # (x, axis)
    largest: Callable[[Array, int], Array]  # (n, k) indices of the largest in each row, ascending
    repeat: Callable[[Array, int], Array]  # repeats each row
    # (logits, k, temperature): the (n, k) int32 most probable tokens, and their float32 nats.
    top_log_probs: Callable[[Array, int, float], tuple[Array, Array]]
    log_softmax: Callable[[Array], Array]  # over the last axis, in float32
    logsumexp: Callable[[Array], Array]  # (n, 1), of the last axis
    as_linear: Callable[[Module, Array], Array]  # (embedding table, queries): all products
    # Reads (n, size) arrays of whole numbers and float32 numbers, with one copy to the host.
    read: Callable[[list[Array]], list[NDArray[Any]]]
    # The last argument of these is an array whose device the new one has.
    zeros: Callable[[tuple[int, ...], Array], Array]  # (shape, like), in the same dtype
    full: Callable[[tuple[int, ...], float, Array], Array]  # (shape, value, like)
    arange: Callable[[int, Array], Array]  # (n, like)
    ids: Callable[[list[Any], Array], Array]  # (token ids, like)
    cast: Callable[[Array, Array], Array]  # (x, like): x in the same dtype
    shift: Callable[[Array, int], Array]  # (blocks, S, size), n rows later, behind n rows of zeros
    normed: Callable[[Array, float], Array]  # (x, eps): an RMS norm without weights


@dataclass(frozen=True, eq=False)
class Slots:
    """The outputs of the drafter at the slots of blocks, which follow one another."""

    output: OutputStage
    hidden: Array  # (slots, hidden_size) outputs of the last layer
    normed: Array  # (slots, hidden_size) u = norm(hidden)
    blocks: int = 1  # the number of blocks, which have equally many slots

    @classmethod
    def read(cls, output: OutputStage, hidden: Array, blocks: int = 1) -> Slots:
        return cls(output, hidden, output.norm(hidden), blocks)

    def at(self, depth: int) -> Array:
        """Return the (blocks, hidden_size) u of all blocks at a depth, which counts from 0."""
        return self.normed.reshape(self.blocks, -1, self.normed.shape[-1])[:, depth]


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """The v tokens that the children of each of n queries are chosen from.

    Backends have subclasses that compute, and that give the shapes.
    """

    output: OutputStage
    marginals: Array  # logits of these tokens by slot
    rows: Rows  # the slot of each query
    tokens: Array | None  # ids of the drafter's vocabulary; None for all

    def logits(self) -> Array:
        """Return the (n, v) float32 logits of the marginals."""
        raise NotImplementedError

    def output_logits(self, queries: Array) -> Array:
        """Return (n, v) logits that the drafter's output head gives (n, hidden_size) queries."""
        raise NotImplementedError

    def products(self, queries: Array, table: Module) -> Array:
        """Return (n, v) float32 products of (n, r) queries with the rows of an embedding table."""
        raise NotImplementedError

    def candidate_products(self, queries: Array, table: Array) -> Array:
        """Multiply with rows of a (vocab, r) table: (n, v) float32, for a head with candidates."""
        raise NotImplementedError


class Head:
    """A head of a drafter, with its tensors under their names in checkpoints.

    Args:
        config: the drafter's.
        inner_size: the inner width of a TreeFlash head.
        vocab_size: the size of the target's vocabulary.
    """

    ops: Operations
    kind: ClassVar[Literal["conditional", "recurrent"]]

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__()

    def confidence(self, slots: Slots, previous: Array, rows: Rows) -> Array | None:
        """Return (n,) expected acceptance of rows' tokens, 0 to 1; None if it is not predicted.

        The (n,) previous tokens are of the target's vocabulary; `rows` are their slots.
        """
        return None


class ConditionalHead(Head):
    """A head whose scores depend on a slot and one previous token."""

    kind = "conditional"
    # Tokens of a slot that the head scores, the most probable by their marginal; None for all.
    candidates: int | None = None

    def queries(self, slots: Slots, previous: Array, rows: Rows) -> Array:
        """Return the (n, size) vectors that `score` compares with tokens; see `Head.confidence`."""
        raise NotImplementedError

    def score(self, queries: Array, scored: ScoredTokens) -> Array:
        """Score tokens: (n, v) of (n, size) queries, in float32 or the output head's dtype."""
        raise NotImplementedError


class RecurrentCell(Head):
    """A head with a state for each path of previous tokens, and a bias on its children's logits."""

    kind = "recurrent"

    @property
    def token_rows(self) -> Module:
        """The embedding table whose rows of r numbers give the bias, as products with a query."""
        raise NotImplementedError

    def step(self, slots: Slots, state: Array, previous: Array, depth: int) -> tuple[Array, Array]:
        """Advance n paths by their (n,) last tokens, of the target's vocabulary.

        Each block has equally many paths, which follow one another. The (n, state_size) state of
        the paths without that token is 0 before the root; the depth of the children counts from 0.
        Returns (n, state_size) states, and (n, r) queries.
        """
        raise NotImplementedError

    def of_paths(self, x: Array, paths: int) -> Array:
        """Return the (paths, size) of the paths' blocks, from (blocks, size)."""
        return self.ops.repeat(x, paths // len(x))
