"""The drafter's proposal: which tokens may follow which at every depth, and its calibration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from treeflash.errors import ConfigError, NumericalError

ROUNDING = 0.01
"""Nats above 0 that a log probability may reach by rounding; more is an error."""
DRAFTER_NOT_FINITE = (
    "the drafter's output is not finite (NaN or infinity): its weights are damaged, or the dtype "
    "overflows; try dtype float32, or method ar to decode without a drafter"
)


@dataclass(frozen=True, eq=False)
class TransitionTable:
    """Candidate children for every depth and previous-token candidate (TreeFlash, section 3).

    `D` depths, `M` rows (previous tokens), `K` children per row. Index 0 of the
    first axis is depth 1. Depth 1 has one valid row, row 0: its previous token is the root.

    Attributes:
        tokens: (D, M, K) int32; children of a row, most probable first.
        log_probs: (D, M, K) float32, nats, at most 0 and non-increasing along K; -inf marks an
            absent child. Values above 0 by rounding are set to 0, because a child more probable
            than its parent would be sorted before it.
        next_row: (D, M, K) int32; the row of the next depth whose previous token is this child,
            or -1 if there is none: the child is then always a leaf.
        confidences: (D, M) float32, 0 to 1; the probability that a row is right, as the drafter
            states it; None if it states none. Not calibrated, and no part of `log_probs`.

    Raises:
        NumericalError: a log probability is NaN or infinity.
        ValueError: a log probability is above 0 by more than rounding, or the arrays' shapes
            differ.
    """

    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    next_row: NDArray[np.int32]
    confidences: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        shapes = [x.shape for x in (self.tokens, self.log_probs, self.next_row)]
        if len(set(shapes)) > 1:
            raise ValueError(f"tokens, log_probs and next_row must have one shape, got {shapes}")
        object.__setattr__(self, "log_probs", check_log_probs(self.log_probs))

    def __repr__(self) -> str:
        depths, rows, children = self.tokens.shape
        return f"TransitionTable(depths={depths}, rows={rows}, children={children})"

    @classmethod
    def from_marginals(
        cls, tokens: NDArray[np.int32], log_probs: NDArray[np.float32]
    ) -> TransitionTable:
        """Build the table of marginals: children do not depend on the previous token.

        It has (D, K) tokens of each depth, most probable first, and their marginal log
        probabilities.
        """
        next_row = np.zeros((len(tokens), 1, tokens.shape[1]), np.int32)
        next_row[-1] = -1
        return cls(tokens[:, None], log_probs[:, None], next_row)

    @classmethod
    def from_candidates(
        cls,
        previous: NDArray[np.int32],
        tokens: NDArray[np.int32],
        log_probs: NDArray[np.float32],
        confidences: NDArray[np.float32] | None = None,
    ) -> TransitionTable:
        """Return the table of an AR head.

        Args:
            previous: (D - 1, M) int32 previous-token candidates of depths 2 to D, distinct at each
                depth; -1 for a row that was not scored.
            tokens: (D, M, K) int32 children, 0 or more; rows that were not scored are ignored, and
                so are the rows of depth 1 after the first.
            log_probs: (D, M, K) float32 log probabilities of the children.
            confidences: (D, M) float32 of the rows; None if the head states none.
        """
        log_probs = log_probs.copy()
        log_probs[0, 1:] = -np.inf
        log_probs[1:][previous < 0] = -np.inf
        next_row = np.full(tokens.shape, -1, np.int32)
        if previous.size:
            next_row[:-1] = _matching_rows(previous, tokens[:-1])
        return cls(tokens, log_probs, next_row, confidences)

    @classmethod
    def from_paths(
        cls,
        tokens: Sequence[NDArray[np.int32]],
        log_probs: Sequence[NDArray[np.float32]],
        kept: Sequence[NDArray[np.integer]],
        confidences: Sequence[NDArray[np.float32]] | None = None,
    ) -> TransitionTable:
        """Build the table of a recurrent head, in which a row follows a path, not one token.

        Args:
            tokens: by depth, (n, K) int32 children of n paths; at depth 1 of the root alone.
            log_probs: by depth, (n, K) float32 of the children.
            kept: by depth, (n',) indices into the n * K children: the children that are the rows of
                the next depth, in order. Not used at the last depth.
            confidences: by depth, (n,) float32 of the rows; None if the head states none.
        """
        children = [x.reshape(1, -1) for x in tokens], [x.reshape(1, -1) for x in log_probs]
        known = None if confidences is None else [x[None] for x in confidences]
        return PathBatch(*children, [x[None] for x in kept], known).dense(0)

    def truncate(self, depths: int) -> TransitionTable:
        """Return the table of the first depths, at least 1; this table if it has no more."""
        if depths >= self.depths:
            return self
        next_row = self.next_row[:depths].copy()
        next_row[-1] = -1
        confidences = None if self.confidences is None else self.confidences[:depths]
        return TransitionTable(self.tokens[:depths], self.log_probs[:depths], next_row, confidences)

    def with_log_probs(self, log_probs: NDArray[np.float32]) -> TransitionTable:
        """Return the table with other log probabilities of the same children."""
        return TransitionTable(self.tokens, log_probs, self.next_row, self.confidences)

    @property
    def depths(self) -> int:
        """Depths that the table covers: the drafter's, or fewer."""
        return len(self.tokens)


class DeferredTable(TransitionTable):
    """A table that is made when one of its arrays is first read, because most never are."""

    _make: Callable[[], TransitionTable]
    _depths: int

    def __init__(self, make: Callable[[], TransitionTable], depths: int) -> None:
        vars(self).update(_make=make, _depths=depths)  # attributes of a table are frozen

    @cached_property
    def _made(self) -> TransitionTable:
        return self._make()

    @property
    def depths(self) -> int:
        return self._depths

    @property
    def tokens(self) -> NDArray[np.int32]:
        return self._made.tokens

    @property
    def log_probs(self) -> NDArray[np.float32]:
        return self._made.log_probs

    @property
    def next_row(self) -> NDArray[np.int32]:
        return self._made.next_row

    @property
    def confidences(self) -> NDArray[np.float32] | None:
        return self._made.confidences


def check_tokens(tables: Sequence[TransitionTable], vocab_size: int) -> None:
    """Raise a ConfigError if a table drafts a token that the target does not have.

    The tokens of a batch come from the vocabulary; a head of a user's own may draft any.
    """
    for table in tables:
        if not isinstance(table, BatchTable):
            drafted = table.tokens[table.log_probs > -np.inf]
            if len(unknown := drafted[(drafted < 0) | (drafted >= vocab_size)]):
                raise ConfigError(
                    f"the head drafted the token {unknown[0]}, and the target's vocabulary has "
                    f"{vocab_size} tokens; correct the head's table"
                )


def check_log_probs(log_probs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return log probabilities, those above 0 by rounding set to 0; see `TransitionTable`."""
    highest = log_probs.max(initial=-np.inf)
    if not highest < np.inf:
        raise NumericalError(DRAFTER_NOT_FINITE)
    if highest > ROUNDING:
        raise ValueError(f"log probabilities must be at most 0, got {highest}")
    return np.minimum(log_probs, np.float32(0)) if highest > 0 else log_probs


def _matching_rows(previous: NDArray[np.int32], tokens: NDArray[np.int32]) -> NDArray[np.int64]:
    """Find each token's (D, M, K) index among its depth's (D, M) previous tokens, or -1.

    A previous token of -1 matches none. It sorts and searches, so that memory grows with the number
    of rows and not with its square.
    """
    depth = np.arange(len(previous), dtype=np.int64) << 32
    keys = (previous + depth[:, None]).ravel()
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    wanted = tokens + depth[:, None, None]
    nearest = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[nearest] == wanted, order[nearest] % previous.shape[1], -1)


class TableBatch(ABC):
    """The rows of several sequences' tables.

    Rows are numbered through all sequences, which have equally many. The last one stands for the
    row of a child that has none: no child of it is possible.

    Attributes:
        depths: of each table.
        rows: of each sequence.
        tokens: (rows, K) int32 children.
        log_probs: (rows, K) float32 of the children, as the head gave them.
        confidences: (rows,) float32; None if the head states none.
        first_row: (sequences,) the row of each sequence's root.
    """

    def __init__(
        self,
        tokens: NDArray[np.int32],
        log_probs: NDArray[np.float32],
        confidences: NDArray[np.float32] | None,
        depths: int,
    ) -> None:
        """Join the (B, n, K) tokens and log probabilities, and the (B, n) confidences, of rows.

        Raises what `TransitionTable` raises.
        """
        count, rows, k = tokens.shape
        self.depths, self.rows, total = depths, rows, count * rows
        none = np.full((1, k), -np.inf, np.float32)
        self.log_probs = np.concatenate([check_log_probs(log_probs).reshape(total, k), none])
        self.tokens = np.concatenate([tokens.reshape(total, k), np.zeros((1, k), np.int32)])
        self.confidences = None
        if confidences is not None:
            self.confidences = np.append(confidences.ravel(), np.float32(1))
        self.first_row = rows * np.arange(count)

    @abstractmethod
    def dense(self, i: int) -> TransitionTable:
        """Return the table of a sequence with arrays of all D * M rows."""

    @abstractmethod
    def following(self, rows: NDArray[np.integer], ranks: NDArray[np.integer]) -> NDArray[np.int32]:
        """Return the rows that follow some children, (n,); the last row stands for none."""

    @abstractmethod
    def row_after(self, row: int, rank: int) -> int:
        """Return the row that follows one child."""

    def tables(self) -> list[TransitionTable]:
        """Return the table of each sequence, from which `draft_trees` finds the batch again."""
        return [BatchTable(self, i) for i in range(len(self.first_row))]

    def path(self, i: int, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield the rows of a sequence that its tokens lead through, and each token's rank.

        The rank is -1 if the token is no child of the row, which then is the last one.
        """
        row, none = int(self.first_row[i]), len(self.tokens) - 1
        for token in tokens:
            children = self.tokens[row].tolist()
            rank = children.index(token) if token in children else -1
            if rank >= 0 and self.log_probs[row, rank] == -np.inf:
                rank = -1
            yield row, rank
            if rank < 0 or (row := self.row_after(row, rank)) == none:
                return


class BatchTable(DeferredTable):
    """The table of a sequence of a batch."""

    batch: TableBatch
    index: int

    def __init__(self, batch: TableBatch, index: int) -> None:
        super().__init__(partial(batch.dense, index), batch.depths)
        vars(self).update(batch=batch, index=index)


class RowBatch(TableBatch):
    """The rows that an AR head scored, one for each previous token.

    The rows of a depth of a sequence are a group; the last group is empty, and stands for the depth
    after the last one.

    Attributes:
        previous: (groups, M) int32 previous token of each row of a group; -1 for no row.
        row_at: (groups, M) int32 the row.
        next_group: (rows,) int32 the group of the rows that follow a row's children.
    """

    def __init__(
        self,
        places: NDArray[np.int32],
        previous: NDArray[np.int32],
        tokens: NDArray[np.int32],
        log_probs: NDArray[np.float32],
        shape: tuple[int, int],
        confidences: NDArray[np.float32] | None = None,
    ) -> None:
        """Join the rows of B sequences: for each one the root's row and n others were scored.

        Args:
            places: (B, n) int32 indices of the n rows among all D * M rows, numbered depth by
                depth.
            previous: (B, n) int32 previous tokens of these rows.
            tokens: (B, 1 + n, K) int32 children, the root's first.
            log_probs: (B, 1 + n, K) float32 log probabilities of the children.
            shape: (D, M) of each table.
            confidences: (B, 1 + n) float32 of the rows; None if the head states none.

        Raises what `TransitionTable` raises.
        """
        (depths, m), (count, rows, _) = shape, tokens.shape
        super().__init__(tokens, log_probs, confidences, depths)
        total, groups = count * rows, count * depths
        depth, place = np.divmod(places, m)
        group = depth + depths * np.arange(count)[:, None]
        self.previous = np.full((groups + 1, m), -1, np.int32)
        self.previous[group, place] = previous
        self.row_at = np.full((groups + 1, m), total, np.int32)
        self.row_at[group, place] = np.arange(1, rows) + self.first_row[:, None]
        self.next_group = np.full(total + 1, groups, np.int32)
        following = self.next_group[:-1].reshape(count, rows)
        if depths > 1:
            following[:, 0] = 1 + depths * np.arange(count)
            following[:, 1:] = np.where(depth + 1 < depths, group + 1, groups)

    def dense(self, i: int) -> TransitionTable:
        groups = slice(i * self.depths, (i + 1) * self.depths)
        rows = self.row_at[groups].copy()
        rows[0, 0] = self.first_row[i]
        return TransitionTable.from_candidates(
            self.previous[groups][1:],
            self.tokens[rows],
            self.log_probs[rows],
            None if self.confidences is None else self.confidences[rows],
        )

    def following(self, rows: NDArray[np.integer], ranks: NDArray[np.integer]) -> NDArray[np.int32]:
        groups = self.next_group[rows]
        matching = self.previous[groups] == self.tokens[rows, ranks][:, None]
        place = matching.argmax(1)
        found: NDArray[np.int32] = np.where(
            matching[np.arange(len(rows)), place], self.row_at[groups, place], len(self.tokens) - 1
        )
        return found

    def row_after(self, row: int, rank: int) -> int:
        group, token = self.next_group[row], int(self.tokens[row, rank])
        previous = self.previous[group].tolist()
        if token not in previous:
            return len(self.tokens) - 1
        return int(self.row_at[group, previous.index(token)])


class PathBatch(TableBatch):
    """The rows of a head that follows paths: each row follows one child.

    Attributes:
        next_row: (rows, K) int32 the row that follows each child.
    """

    def __init__(
        self,
        tokens: Sequence[NDArray[np.int32]],
        log_probs: Sequence[NDArray[np.float32]],
        kept: Sequence[NDArray[np.integer]],
        confidences: Sequence[NDArray[np.float32]] | None = None,
    ) -> None:
        """Join the paths of B sequences; `TransitionTable.from_paths` has the arguments of each.

        The arrays of a depth are (B, n * K), (B, n * K), (B, n') and (B, n). Raises what
        `TransitionTable` raises.
        """
        depths, (count, k) = len(tokens), tokens[0].shape
        m = max(x.shape[1] for x in tokens) // k
        shape, total = (count, depths, m * k), count * depths * m
        all_tokens, all_log_probs = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)
        next_row = np.full(shape, total, np.int32)
        known = None if confidences is None else np.ones((count, depths, m), np.float32)
        for depth, children in enumerate(tokens):
            all_tokens[:, depth, : children.shape[1]] = children
            all_log_probs[:, depth, : children.shape[1]] = log_probs[depth]
            if known is not None and confidences is not None:
                known[:, depth, : confidences[depth].shape[1]] = confidences[depth]
            if depth + 1 < depths:
                first = m * (depth + 1 + depths * np.arange(count)[:, None])
                rows = first + np.arange(kept[depth].shape[1])
                np.put_along_axis(next_row[:, depth], kept[depth], rows, 1)
        by_row = count, depths * m, k
        super().__init__(all_tokens.reshape(by_row), all_log_probs.reshape(by_row), known, depths)
        self.next_row = np.append(next_row.reshape(total, k), np.full((1, k), total, np.int32), 0)

    def dense(self, i: int) -> TransitionTable:
        part, m = slice(i * self.rows, (i + 1) * self.rows), self.rows // self.depths
        shape = self.depths, m, self.tokens.shape[1]
        next_row = self.next_row[part]
        next_row = np.where(next_row == len(self.tokens) - 1, -1, next_row % m)
        return TransitionTable(
            self.tokens[part].reshape(shape),
            self.log_probs[part].reshape(shape),
            next_row.reshape(shape),
            None if self.confidences is None else self.confidences[part].reshape(shape[:2]),
        )

    def following(self, rows: NDArray[np.integer], ranks: NDArray[np.integer]) -> NDArray[np.int32]:
        found: NDArray[np.int32] = self.next_row[rows, ranks]
        return found

    def row_after(self, row: int, rank: int) -> int:
        return int(self.next_row[row, rank])


EXPONENTS = 2.0 ** np.arange(-2, 2.125, 0.125)
"""Exponents of probabilities: above 1 makes a distribution sharper, below 1 flatter."""
LOG_EXPONENTS = np.log(EXPONENTS)
SPREAD = 0.2
"""Standard deviation of the logarithm of the exponent before anything was seen."""
MIN_REST = 1e-3
"""Least probability of the tokens that a row does not list: the drafter may not know all tokens,
and a smaller rest is rounding noise of float32."""


@dataclass(eq=False)
class Calibration:
    """How much sharper or flatter a drafter's distributions should be, learned per sequence.

    If the probabilities are too flat, a tree is too wide; if they are too sharp, it is too deep.
    All rows are raised to one exponent and normalised: the exponent's inverse is a temperature (Guo
    et al. 2017). It is learned by Bayes' rule from the target's token after each row that was
    reached, drafted or not, so that the trees' shapes do not bias it. It depends on the sequence so
    far alone, and never changes the output.

    Attributes:
        vocab_size: of the target.
        log_weights: of the exponents, given the tokens seen so far.
    """

    vocab_size: int
    log_weights: NDArray[np.float64] = field(
        default_factory=lambda: -0.5 * (LOG_EXPONENTS / SPREAD) ** 2
    )

    @property
    def exponent(self) -> float:
        """The geometric mean of the exponents by their weights; 1 before anything was seen."""
        weights = np.exp(self.log_weights - self.log_weights.max())
        return float(np.exp(weights @ LOG_EXPONENTS / weights.sum()))

    def correct(self, table: TransitionTable, exponent: float | None = None) -> TransitionTable:
        """Return the table with calibrated probabilities; the order of children is the same.

        The exponent is the present one by default.
        """
        exponent = self.exponent if exponent is None else exponent
        log_probs = calibrate(table.log_probs, exponent, self.vocab_size)
        return table.with_log_probs(log_probs)

    def deferred(self, table: TransitionTable, exponent: float) -> TransitionTable:
        """Return what `correct` returns at an exponent; its arrays are made when they are read."""
        return DeferredTable(partial(self.correct, table, exponent), table.depths)

    def observe(self, table: TransitionTable, tokens: Sequence[int]) -> None:
        """Learn from a table as it was drafted, and the target's tokens after the root."""
        row = 0
        for depth, token in enumerate(tokens[: table.depths]):
            log_probs = table.log_probs[depth, row]
            children = table.tokens[depth, row] == token
            ranks = np.flatnonzero(children & np.isfinite(log_probs))
            rank = ranks[:1] if len(ranks) else np.array([-1])
            (score,), (total,) = powers(log_probs[None], rank, self.vocab_size)
            self.add(score, total)
            if not len(ranks):
                return
            row = int(table.next_row[depth, row, ranks[0]])
            if row < 0:
                return

    def add(self, score: NDArray[np.float64], total: NDArray[np.float64]) -> None:
        """Learn from the target's token after a row; see `powers` for the (exponents,) numbers."""
        self.log_weights = self.log_weights + score - total


def calibrate(
    log_probs: NDArray[np.float32], exponents: NDArray[np.float64] | float, vocab_size: int
) -> NDArray[np.float32]:
    """Return log probabilities of rows, raised to an exponent and normalised.

    Args:
        log_probs: (..., K) of the rows' children; -inf stays.
        exponents: of all rows, or (...,) of each.
        vocab_size: of the target.
    """
    wide = log_probs.astype(np.float64)
    scores = np.asarray(exponents)[..., None] * wide
    total = np.exp(scores).sum(-1) + np.exp(_rest(wide, exponents, vocab_size))
    calibrated: NDArray[np.float64] = np.minimum(scores - np.log(total)[..., None], 0)
    return calibrated.astype(np.float32)


def powers(
    log_probs: NDArray[np.float32], ranks: NDArray[np.integer], vocab_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what the target's token after each row says about `EXPONENTS`, before normalising.

    Args:
        log_probs: (n, K) of the rows' children.
        ranks: (n,) of the token among the children; -1 if it is none of them.
        vocab_size: of the target.

    Returns:
        (n, exponents) log powers of the token's probability, and of the sum of all tokens'.
    """
    wide = log_probs.astype(np.float64)
    scores = EXPONENTS[:, None] * wide[:, None]
    rest = _rest(wide[:, None], EXPONENTS, vocab_size)
    total = np.log(np.exp(scores).sum(-1) + np.exp(rest))
    listed = scores[np.arange(len(ranks)), :, ranks]
    return np.where(ranks[:, None] < 0, rest, listed), total


def _rest(
    log_probs: NDArray[np.float64], exponents: NDArray[np.float64] | float, vocab_size: int
) -> NDArray[np.float64]:
    """Return the log of the summed powers of the probabilities of the tokens that rows do not list.

    Each of these tokens is taken to be as probable as the row's last child, or less probable if
    the vocabulary has too few tokens for that.
    """
    rest = np.log(np.maximum(1 - np.exp(log_probs).sum(-1), MIN_REST))
    last = np.where(log_probs > -np.inf, log_probs, 0).min(-1)
    number = np.minimum(np.maximum(rest - last, 0), np.log(vocab_size))
    total: NDArray[np.float64] = (1 - exponents) * number + exponents * rest
    return total
