"""Trees from several sources: a drafter's table, copies of the text, and a constraint.

The problem. A grammar often leaves no choice: after `"na` only `me` may follow. A drafter does not
know that, drafts what the grammar forbids, and without a drafter nothing is drafted at all.

The idea. A tree grows best first, and a node asks its sources for its children when it joins:

- the row of the drafter's table, without the tokens that are forbidden, normalised again;
- the copies that `treeflash.decoding.suffix` proposes, where they are allowed;
- the constraint. A single allowed token is forced: its probability is 1. Where few are allowed, the
  tokens that were allowed tell the grammar's state, and what the target chose in the same state
  before tells what it may choose now. So a text that writes `": "` after its first key is expected
  to write it after the others, and later answers to the same schema follow the first one's layout.

An example. The grammar is in a state that allows `":` and `" :`. The target met the state three
times and always chose `":`. Without a drafter each token has 1/2 beforehand, which counts as much
as one choice: `":` gets (3 + 1/2) / (3 + 1) = 0.875, and `" :` gets (0 + 1/2) / 4.

The rule. `GrowingTree` is the loop, `merge` joins a table with copies, and `merge_allowed` does so
under a constraint, whose masks it returns: verification needs them anyway. The constraint moves
between the paths of the tree by `advance` and `rollback`. `Choices` counts what the target chose.
Forced tokens need no rule of their own: they are the states with one choice. A constraint that ends
reasoning after some tokens gains in the same way.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.sampling import Constraint
from treeflash.decoding.suffix import MAX_MATCH, MIN_PROB, SuffixTree
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree

MAX_CHOICES = 128
"""Most allowed tokens of a state whose choices are counted; after more, the text is free."""
MAX_STATES = 1024
"""Most states of constraints that are remembered; the least recently met ones are dropped."""


@dataclass(frozen=True, slots=True)
class Child:
    """A possible child of a node."""

    token: int
    log_prob: float  # after its parent
    row: int = -1  # the row of the table, for its children; -1 if there is none
    source: int = -1  # the node of the proposal; -1 if it has none
    match: int = 0  # tokens matched, see `DraftTree.matches`
    confidence: float = 1.0  # confidence, see `DraftTree.confidences`


@dataclass(eq=False)
class GrowingTree:
    """The nodes of a tree so far, the root first."""

    nodes: list[Child]
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    log_probs: list[float] = field(default_factory=lambda: [0.0])  # log probability of each path

    def grow(self, size: int, children: Callable[[int], Iterator[Child]]) -> None:
        """Add the best paths, best first, up to `size` nodes.

        `children` gives the children of a node, best first. It is called once for each node, in the
        order of the nodes.
        """
        # Each entry is the best child of its parent that is not chosen yet: the heap has (-log
        # probability, number of the entry, parent, child, the parent's other children).
        heap: list[tuple[float, int, int, Child, Iterator[Child]]] = []
        count = 0

        def push(parent: int, others: Iterator[Child]) -> None:
            nonlocal count
            if (child := next(others, None)) is not None:
                count += 1
                entry = (-self.log_probs[parent] - child.log_prob, count, parent, child, others)
                heapq.heappush(heap, entry)

        push(0, children(0))
        while heap and len(self.nodes) < size:
            negative, _, parent, child, others = heapq.heappop(heap)
            push(parent, others)
            self.nodes.append(child)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1)
            self.log_probs.append(-negative)
            node = len(self.nodes) - 1
            push(node, children(node))

    def finish(self, *, confidences: bool) -> DraftTree:
        """Return the tree, with `confidences` if the drafter states them."""
        known = np.array([x.confidence for x in self.nodes], np.float32) if confidences else None
        return DraftTree(
            np.array([x.token for x in self.nodes], np.int32),
            np.array(self.parents, np.int32),
            np.array(self.depths, np.int32),
            np.array(self.log_probs),
            known,
            np.array([x.match for x in self.nodes], np.int32),
        )


def merge(table: TransitionTable, proposal: SuffixTree, root: int, nodes: int) -> DraftTree:
    """Join a drafter's calibrated table with a proposal: the best paths of both, best first.

    Equal tokens after one parent are one node, which has the higher of the two probabilities and
    the children of both. The nodes of the proposal may be deeper than the table. There are at most
    `nodes`, including the root.
    """
    sources = proposal.children()
    tree = GrowingTree([Child(root, 0.0, 0, 0)])

    def children(node: int) -> Iterator[Child]:
        known = tree.nodes[node]
        copies = sources[known.source] if known.source >= 0 else []
        drafts = _table_children(table, tree.depths[node], known.row)
        return _with_copies(list(drafts), proposal, copies) if copies else drafts

    tree.grow(nodes, children)
    return tree.finish(confidences=table.confidences is not None)


def merge_allowed(
    table: TransitionTable | None,
    proposal: SuffixTree | None,
    root: int,
    nodes: int,
    constraint: Constraint,
    seen: Callable[[Allowed], Counter[int]],
    *,
    deepest: int,
    stops: Set[int] = frozenset(),
    chain: bool = False,
) -> tuple[DraftTree, NDArray[np.uint32]]:
    """Join a table and a proposal with what a constraint allows; one of the two may be missing.

    Args:
        table: the drafter's.
        proposal: copies of the text.
        root: the newest token, over which the constraint has advanced.
        nodes: the most nodes, the root included.
        constraint: its state is the same afterwards.
        seen: gives what the target chose before in the state of a mask.
        deepest: the depth of the deepest nodes.
        stops: tokens that end the text, so that nothing is drafted after them.
        chain: whether each node has only its best child.

    Returns:
        The tree, and the (n, ceil(vocab / 32)) masks of its nodes.
    """
    sources = [] if proposal is None else proposal.children()
    first = Child(root, 0.0, -1 if table is None else 0, -1 if proposal is None else 0)
    tree = GrowingTree([first])
    masks: list[NDArray[np.uint32]] = []
    walked: list[int] = []  # the nodes below the root that the constraint has advanced over

    def walk(node: int) -> None:
        path = []
        while node:
            path.append(node)
            node = tree.parents[node]
        path.reverse()
        same = next(
            (i for i, (a, b) in enumerate(zip(path, walked, strict=False)) if a != b),
            min(len(path), len(walked)),
        )
        if same < len(walked):
            constraint.rollback(len(walked) - same)
        for step in path[same:]:
            constraint.advance(tree.nodes[step].token)
        walked[:] = path

    def children(node: int) -> Iterator[Child]:
        walk(node)
        masks.append(constraint.allowed())
        known, allowed = tree.nodes[node], Allowed(masks[-1])
        if tree.depths[node] >= deepest or known.token in stops:
            return iter(())
        found: list[Child] = []
        if table is not None:
            found = allowed.restrict(list(_table_children(table, tree.depths[node], known.row)))
        if proposal is not None and known.source >= 0:
            copies = [x for x in sources[known.source] if allowed.has(proposal.tokens[x])]
            found = list(_with_copies(found, proposal, copies))
        if 0 < allowed.count <= MAX_CHOICES:
            floor = min(math.log(MIN_PROB) - tree.log_probs[node], 0.0)
            found = _with_choices(found, allowed, seen(allowed), floor)
        return iter(found[:1] if chain else found)

    tree.grow(nodes, children)
    walk(0)
    has_confidences = table is not None and table.confidences is not None
    return tree.finish(confidences=has_confidences), np.stack(masks)


class Allowed:
    """The tokens that a (words,) mask allows.

    Attributes:
        count: the number of them.
    """

    def __init__(self, mask: NDArray[np.uint32]) -> None:
        self._bits = mask.astype("<u4", copy=False).tobytes()
        self.count = int.from_bytes(self._bits, "little").bit_count()

    @property
    def state(self) -> int:
        """A number that tells the mask from most other masks."""
        return crc32(self._bits)

    def has(self, token: int) -> bool:
        return bool(self._bits[token >> 3] >> (token & 7) & 1)

    def tokens(self) -> list[int]:
        """List the tokens, ascending."""
        found = np.frombuffer(self._bits, np.uint8)
        places = np.flatnonzero(found)
        bits = np.unpackbits(found[places, None], axis=1, bitorder="little")
        row, bit = np.nonzero(bits)
        tokens: list[int] = (8 * places[row] + bit).tolist()
        return tokens

    def restrict(self, children: Sequence[Child]) -> list[Child]:
        """Drop forbidden children of a row of a table, and normalise what is left.

        The tokens that the row does not list share what its children leave of 1 equally.
        """
        kept = [child for child in children if self.has(child.token)]
        listed = sum(math.exp(child.log_prob) for child in kept)
        rest = max(1 - sum(math.exp(child.log_prob) for child in children), 0.0)
        share = (self.count - len(kept)) / (8 * len(self._bits) - len(children) + 1)
        if not listed:  # or so small that it tells nothing
            return []
        total = math.log(listed + rest * min(share, 1.0))
        return [replace(child, log_prob=min(child.log_prob - total, 0.0)) for child in kept]


class Choices:
    """What targets chose where a constraint allowed few tokens, by salt and state.

    Through it texts influence how fast later ones with the same salt are decoded, and never their
    tokens. The least recent of more than `max_states` states is forgotten.
    """

    def __init__(self, max_states: int = MAX_STATES) -> None:
        self.max_states = max_states
        self._counts: dict[tuple[Hashable, int], Counter[int]] = {}  # the latest state last

    def seen(self, salt: Hashable, allowed: Allowed) -> Counter[int]:
        """Return the choices so far in a state of few allowed tokens."""
        return self._counts.get((salt, allowed.state), Counter())

    def observe(self, salt: Hashable, mask: NDArray[np.uint32], token: int) -> None:
        """Count what the target chose at a node with this mask."""
        allowed = Allowed(mask)
        if not 1 < allowed.count <= MAX_CHOICES:
            return
        key = salt, allowed.state
        counts = self._counts.pop(key, Counter())
        counts[token] += 1
        self._counts[key] = counts
        if len(self._counts) > self.max_states:
            del self._counts[next(iter(self._counts))]


def _table_children(table: TransitionTable, depth: int, row: int) -> Iterator[Child]:
    """Iterate over the children of a row of a table, best first; row -1 has none."""
    if row < 0 or depth >= table.depths:
        return
    confidence = 1.0 if table.confidences is None else float(table.confidences[depth, row])
    for token, log_prob, next_row in zip(
        table.tokens[depth, row].tolist(),
        table.log_probs[depth, row].tolist(),
        table.next_row[depth, row].tolist(),
        strict=True,
    ):
        if log_prob == -math.inf:
            return
        yield Child(token, log_prob, next_row, confidence=confidence)


def _with_copies(
    children: list[Child], proposal: SuffixTree, copies: Sequence[int]
) -> Iterator[Child]:
    """Join the children of a row with the children of a proposal's node, best first."""
    by_token = {child.token: child for child in children}
    for copy in copies:
        token = proposal.tokens[copy]
        log_prob = math.log(proposal.probs[copy] / proposal.probs[proposal.parents[copy]])
        child = by_token.get(token, Child(token, -math.inf))
        if log_prob >= child.log_prob:
            child = replace(child, log_prob=log_prob, match=proposal.lengths[copy])
        by_token[token] = replace(child, source=copy)
    return iter(sorted(by_token.values(), key=lambda child: -child.log_prob))


def _with_choices(
    children: list[Child], allowed: Allowed, counts: Counter[int], floor: float
) -> list[Child]:
    """Join allowed children with what was chosen in the same state before, best first.

    The probabilities beforehand are the children's, or uniform ones if there are none. New children
    have log probabilities of at least `floor`.
    """
    by_token = {child.token: child for child in children}
    uniform = 0.0 if children and allowed.count > 1 else 1 / allowed.count
    total = counts.total()
    added = set(counts)
    if uniform and math.log(uniform / (total + 1)) >= floor:
        added.update(allowed.tokens())
    for token in added:
        child = by_token.get(token, Child(token, -math.inf))
        before = uniform or math.exp(child.log_prob)
        log_prob = math.log((counts[token] + before) / (total + 1))
        if log_prob >= max(floor, child.log_prob):
            match = min(total + 1, MAX_MATCH) if allowed.count > 1 else MAX_MATCH
            by_token[token] = replace(child, log_prob=log_prob, match=match)
    return sorted(by_token.values(), key=lambda child: -child.log_prob)
