"""Drafts without a drafter: what followed the last tokens where they occurred before.

The problem. Text that edits, quotes or reformats repeats long parts of what stands before it. A
drafter has to predict these parts token by token; whoever remembers the text can copy them.

The idea (SuffixDecoding, Oliaro et al., arXiv 2411.04975). Find the earlier occurrences of the last
m tokens, and draft the tree of what followed them. A node of the tree is the set of places in the
text that agree with the path to it. A child's share is the part of its parent's places that
continue with its token, and the probability of a path is the product of its shares. Nodes are taken
best first. Each m gives a tree; the one with the highest sum of path probabilities is drafted.

An example. The text is `a b c d  x b c e  y b c d  z b c`, and the last two tokens are `b c`. They
occurred three times before, and `d`, `e`, `d` followed: the children of the root are `d` with 2/3
and `e` with 1/3. After `d` came `x` and `z`, after `e` came `y`:

    c ──┬── d (2/3) ──┬── x (1/3)          sum of the probabilities, which is the number of
        │             └── z (1/3)          drafts that are expected to be right:
        └── e (1/3) ───── y (1/3)          2/3 + 1/3 + 1/3 + 1/3 + 1/3 = 2

Calibration. Shares say which continuation is the most frequent one, not how often a text repeats at
all: after one occurrence the share is 1, and the drafts may still all be wrong. So each sequence
counts, by the length of the match, how often the most frequent token was right, and compares it
with the sum of its shares. If the matches of two tokens above were right once while their shares
sum to 2, their rate is 1/2, and `d` gets 1/2 * 2/3. Before anything was seen, `PRIOR_RATES` stand
in, with the weight `RATE_WEIGHT`. A deeper node continues a longer match (a node at depth 3 after
a match of 2 has one of 4), so that the deep nodes of a long match stay probable. The counts do not
know the noise of sampling, so drafts are chosen without it.

The rule. `SuffixIndex` finds places. It chains the places of n-grams of the lengths `ORDERS`: a
hash table has the latest place of a slot, and an array the place before each place; everything else
is read from the text. A token costs a microsecond or two and about 30 bytes, and the time of a
proposal does not grow with the text. `expand` grows a tree, `best_tree` compares lengths of the
match, and `SuffixDrafter` does both for one sequence and learns the rates. How the tree is joined
with a drafter's table is in `treeflash.decoding.merged_trees`.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np

from treeflash.decoding.tree import DraftTree

ORDERS = (2, 5)
"""Lengths of the n-grams whose places are chained. The longest one finds long matches whose end is
frequent; the shortest one is the shortest match that is drafted from."""
MAX_OCCURRENCES = 32
"""Latest occurrences of an n-gram that are compared with the text."""
MAX_MATCH = 32
"""Most tokens of a match that are compared; longer matches are not more reliable."""
MIN_SLOTS = 64
MULTIPLIER, HASH_SHIFT = 0x9E3779B97F4A7C15, 29
"""The hash of an n-gram is a polynomial of its tokens modulo 2**64, without the lowest bits."""
MAX_INDEX_BYTES = 1 << 25
"""A cache begins a new index beyond this size, so that growing one never takes noticeable time."""
SCORE_ROUNDING = 1e-9
"""Scores that differ by less count as equal."""
SEPARATOR = -1
"""It ends each text of an index, and is never a token."""


class SuffixIndex:
    """Where n-grams occur in a growing text, or in several texts, which end with `SEPARATOR`.

    `orders` are the lengths of the n-grams, ascending. A context is compared with the latest
    `occurrences` for each order.
    """

    def __init__(self, orders: Sequence[int] = ORDERS, occurrences: int = MAX_OCCURRENCES) -> None:
        self.orders, self.occurrences = orders, occurrences
        self.tokens = array("i")
        # Both are by order: the latest end of an n-gram in each slot, and the end before each end.
        self._latest = [array("i", [-1]) * MIN_SLOTS for _ in orders]
        self._previous = [array("i") for _ in orders]

    @property
    def nbytes(self) -> int:
        """Memory, bytes."""
        arrays = (self.tokens, *self._latest, *self._previous)
        return sum(len(x) * x.itemsize for x in arrays)

    def extend(self, tokens: Iterable[int]) -> None:
        first = len(self.tokens)
        self.tokens.extend(tokens)
        if len(self.tokens) > len(self._latest[0]):
            self._rebuild()
            return
        for order, latest, previous in zip(self.orders, self._latest, self._previous, strict=True):
            for end in range(first, len(self.tokens)):
                if end + 1 < order:
                    previous.append(-1)
                    continue
                slot = _slot(self.tokens[end + 1 - order : end + 1], len(latest))
                previous.append(latest[slot])
                latest[slot] = end

    def _rebuild(self) -> None:
        """Chain all n-grams again, with room for twice the tokens."""
        slots = 1 << len(self.tokens).bit_length()
        tokens = np.array(self.tokens, np.int64).astype(np.uint64)
        for number, order in enumerate(self.orders):
            latest = np.full(slots, -1, np.int32)
            previous = np.full(len(tokens), -1, np.int32)
            # More than `MIN_SLOTS` tokens have n-grams of every order.
            keys = np.zeros(len(tokens) + 1 - order, np.uint64)
            for i in range(order):
                keys = keys * np.uint64(MULTIPLIER) + tokens[i : i + len(keys)]
            keys = (keys >> np.uint64(HASH_SHIFT)) & np.uint64(slots - 1)
            by_slot = np.argsort(keys, kind="stable")
            same = keys[by_slot[1:]] == keys[by_slot[:-1]]
            ends = (by_slot + order - 1).astype(np.int32)
            previous[ends[1:][same]] = ends[:-1][same]
            latest[keys[by_slot]] = ends  # the last one of a slot remains
            self._latest[number] = array("i", latest.tobytes())
            self._previous[number] = array("i", previous.tobytes())

    def find(self, context: Sequence[int], longest: int = MAX_MATCH) -> dict[int, int]:
        """Map the place after each earlier occurrence of `context` to the length of the match.

        At most `longest` tokens of the context are compared, and at least the shortest order
        matches. The context may be the index's own tokens.
        """
        found: dict[int, int] = {}
        for order, latest, previous in zip(
            reversed(self.orders), reversed(self._latest), reversed(self._previous), strict=True
        ):
            if len(context) < order:
                continue
            end = latest[_slot(context[-order:], len(latest))]
            compared = 0
            while end >= 0 and compared < self.occurrences:
                if end + 1 < len(self.tokens) and end + 1 not in found:
                    length = self._match(context, end, longest)
                    if length >= self.orders[0]:
                        found[end + 1] = length
                compared += 1
                end = previous[end]
        return found

    def _match(self, context: Sequence[int], end: int, longest: int) -> int:
        """Return the length of the common suffix of `context` and `self.tokens[: end + 1]`."""
        tokens, last = self.tokens, len(context) - 1
        limit = min(longest, end + 1, len(context))
        length = 0
        while length < limit and tokens[end - length] == context[last - length]:
            length += 1
        return length


def _slot(tokens: Iterable[int], slots: int) -> int:
    """Hash an n-gram to one of `slots` slots, a power of two; `_rebuild` does so for many."""
    key = 0
    for token in tokens:
        key = (key * MULTIPLIER + token) & (2**64 - 1)
    return (key >> HASH_SHIFT) & (slots - 1)


class SuffixCache:
    """Indices over finished answers, separate for each salt; the oldest are dropped at `max_bytes`.

    Through them other users' texts influence how fast a text is decoded, and never its tokens.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._indices: list[tuple[Hashable, SuffixIndex]] = []  # the newest last

    @property
    def nbytes(self) -> int:
        """Memory of all indices, bytes."""
        return sum(index.nbytes for _, index in self._indices)

    def indices(self, salt: Hashable) -> list[SuffixIndex]:
        """Return the indices of a salt, the newest first."""
        return [index for other, index in reversed(self._indices) if other == salt]

    def add(self, salt: Hashable, tokens: Sequence[int]) -> None:
        newest = next(iter(self.indices(salt)), None)
        if newest is None or newest.nbytes >= min(self.max_bytes // 4, MAX_INDEX_BYTES):
            newest = SuffixIndex()
            self._indices.append((salt, newest))
        newest.extend([*tokens, SEPARATOR])
        while self.nbytes > self.max_bytes:
            del self._indices[0]


ChildProbability: TypeAlias = Callable[[int, int, int], float]
"""The probability of a child, from (length of the match, its places, its parent's places)."""


@dataclass(frozen=True, eq=False)
class SuffixTree:
    """What followed earlier occurrences, best first; node 0 is the last token of the context."""

    match: int  # tokens of the context that match
    # The lists have an entry for each node; the token of node 0 has no meaning.
    tokens: list[int] = field(default_factory=lambda: [SEPARATOR])
    # Parents precede their children; node 0 has -1.
    parents: list[int] = field(default_factory=lambda: [-1])
    # The probabilities are of the paths from node 0.
    probs: list[float] = field(default_factory=lambda: [1.0])
    # The shares are of the parents' places.
    shares: list[float] = field(default_factory=lambda: [1.0])
    # The lengths are of the match before each node, which includes the path to it.
    lengths: list[int] = field(default_factory=lambda: [0])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def score(self) -> float:
        """The expected number of right nodes, node 0 not counted."""
        return sum(self.probs) - 1

    def children(self) -> list[list[int]]:
        """Return the children of each node, best first."""
        children: list[list[int]] = [[] for _ in self.tokens]
        for node in range(1, len(self)):
            children[self.parents[node]].append(node)
        return children


def expand(
    index: SuffixIndex,
    places: Sequence[int],
    match: int,
    nodes: int,
    *,
    edge: ChildProbability,
    min_prob: float,
    deepest: int,
) -> SuffixTree:
    """Build the tree of the tokens from some places on, best first.

    Args:
        index: has the text.
        places: the places of the tokens after the occurrences.
        match: the length of the occurrences.
        nodes: the most nodes of the tree, node 0 not counted.
        edge: computes the probability of a child of a node.
        min_prob: less probable paths are left out.
        deepest: the depth of the deepest nodes.
    """
    tree, tokens, end = SuffixTree(match), index.tokens, len(index.tokens)
    # The heap has (-probability, number of the entry, depth, parent, token, share, places).
    heap: list[tuple[float, int, int, int, int, float, Sequence[int]]] = []
    count = 0
    node, depth, prob = 0, 0, 1.0
    while True:
        if depth < deepest:
            groups: dict[int, list[int]] = {}
            for place in places:
                if place < end and (token := tokens[place]) != SEPARATOR:
                    groups.setdefault(token, []).append(place + 1)
            for token, following in groups.items():
                child = prob * edge(match + depth, len(following), len(places))
                if child >= min_prob:
                    count += 1
                    part = len(following) / len(places)
                    entry = (-child, count, depth + 1, node, token, part, following)
                    heapq.heappush(heap, entry)
        if not heap or len(tree) > nodes:
            return tree
        negative, _, depth, parent, token, part, places = heapq.heappop(heap)
        node, prob = len(tree), -negative
        tree.tokens.append(token)
        tree.parents.append(parent)
        tree.probs.append(prob)
        tree.shares.append(part)
        tree.lengths.append(match + depth - 1)


def best_tree(
    found: Mapping[int, int],
    matches: Iterable[int],
    grow: Callable[[Sequence[int], int], SuffixTree],
) -> SuffixTree | None:
    """Choose the tree of highest score over several lengths of a match; ties go to the longer one.

    `found` has places and lengths, as `SuffixIndex.find` returns them. `matches` are the lengths to
    try, ascending; `grow` builds the tree of the places and the length of a match.
    """
    best: SuffixTree | None = None
    for match in matches:
        places = [place for place, length in found.items() if length >= match]
        if not places:
            break
        tree = grow(places, match)
        if best is None or tree.score > best.score - SCORE_ROUNDING:
            best = tree
    return best


MATCH_LEVELS = (3, 5, 9, 17)
"""Lengths of a match at which a level of `PRIOR_RATES` begins, after the first level."""
PRIOR_RATES = (0.5, 0.6, 0.75, 0.85, 0.95)
"""Rates of right continuations by level before anything was seen, as parts of the shares.
SmolLM2-135M repeats itself more: 0.6, 0.7, 0.8, 0.88 and 0.97 on 250 of its answers."""
RATE_WEIGHT = 4.0
"""Weight of the prior rates: the sum of shares that would count as much."""
MIN_RATE = 0.1
"""Lowest rate: a text that did not repeat itself may begin to."""
MIN_PROB = 0.03
"""Lowest probability of a proposed path; to verify a node costs at least about that part of a
token."""
MAX_LENGTHS = 2
"""Number of lengths of a match that are tried, the longest ones first."""
MAX_NODES = 64
"""Most nodes of a proposal, so that it takes a fraction of a millisecond."""


def match_level(length: int) -> int:
    """Return the level of a match by its length, 0 to 4."""
    return bisect_right(MATCH_LEVELS, length)


class SuffixDrafter:
    """Proposes continuations of one sequence, and learns how often they are right.

    `shared` gives the indices over other texts.
    """

    def __init__(
        self, prompt_ids: Sequence[int], shared: Callable[[], Sequence[SuffixIndex]] = lambda: ()
    ) -> None:
        self.index, self.shared = SuffixIndex(), shared
        self.index.extend(prompt_ids)
        self._right = [rate * RATE_WEIGHT for rate in PRIOR_RATES]
        self._expected = [RATE_WEIGHT] * len(PRIOR_RATES)
        self._proposal: SuffixTree | None = None

    def propose(self, nodes: int, deepest: int) -> SuffixTree | None:
        """Propose what may follow the sequence's last token; None if nothing is known.

        It has at most `nodes`, the root included, down to the depth `deepest`.
        """
        best: SuffixTree | None = None
        for index in (self.index, *self.shared()):
            found = index.find(self.index.tokens)
            # Matches between two of these lengths have the places of the longer one.
            matches = sorted(set(found.values()))[-MAX_LENGTHS:]
            grow = partial(
                expand,
                index,
                nodes=min(nodes - 1, MAX_NODES),
                edge=self._edge,
                min_prob=MIN_PROB,
                deepest=deepest,
            )
            tree = best_tree(found, matches, grow)
            if tree is not None and (best is None or tree.score > best.score):
                best = tree
        self._proposal = best
        return best

    def observe(self, tokens: Sequence[int]) -> None:
        """Append the target's tokens after the root, and learn from those that were proposed."""
        tree, node = self._proposal, 0
        children = [] if tree is None else tree.children()
        for token in tokens:
            if tree is None or not children[node]:
                break
            first = children[node][0]
            level = match_level(tree.lengths[first])
            self._expected[level] += tree.shares[first]
            self._right[level] += tree.tokens[first] == token
            following = [child for child in children[node] if tree.tokens[child] == token]
            if not following:
                break
            node = following[0]
        self._proposal = None
        self.index.extend(tokens)

    def _edge(self, length: int, places: int, all_places: int) -> float:
        level = match_level(length)
        rate = self._right[level] / self._expected[level]
        return min(max(rate, MIN_RATE), 1.0) * places / all_places


def tree_of(proposal: SuffixTree, root: int, nodes: int) -> DraftTree:
    """Build the draft tree of a proposal's best nodes, at most `nodes` with the root."""
    parents = proposal.parents[:nodes]
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return DraftTree(
        np.array([root, *proposal.tokens[1:nodes]], np.int32),
        np.array(parents, np.int32),
        np.array(depths, np.int32),
        np.log(proposal.probs[:nodes]),
        matches=np.array(proposal.lengths[:nodes], np.int32),
    )
