"""Copies of the text: the index, SuffixDecoding's trees, calibration, and joining with a table.

The numbers of arctic-inference are among the published checkpoints.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from fake_models import PROMPT, scripted
from published_drafters import ROOT, needs_fixtures

from treeflash.config import DecodeConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.merged_trees import merge
from treeflash.decoding.suffix import (
    MAX_MATCH,
    MAX_NODES,
    ORDERS,
    SEPARATOR,
    SuffixCache,
    SuffixDrafter,
    SuffixIndex,
    SuffixTree,
    best_tree,
    expand,
    tree_of,
)
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.testing.comparisons import paths as token_paths
from treeflash.testing.comparisons import tokens_of


def published_drafts() -> Iterator[tuple[dict[str, Any], list[list[int]], list[int], int]]:
    """The drafts of the published code, with their texts, contexts and depths of trees."""
    for case in json.loads((ROOT / "suffix/expected.json").read_text(encoding="utf-8"))["cases"]:
        texts = case["sequences"]
        for draft in case["drafts"]:
            context = [*texts, case["unseen"]][draft["sequence"]][: draft["length"]]
            yield draft, texts, context, case["max_depth"]


ALL = 10**9
"""More occurrences than any text has."""


def share(length: int, places: int, all_places: int) -> float:
    """The share of the places that continue with a token, as SuffixDecoding has it."""
    return places / all_places


def published_index(texts: list[list[int]]) -> SuffixIndex:
    index = SuffixIndex(orders=(1,), occurrences=ALL)
    for text in texts:
        index.extend([*text, SEPARATOR])
    return index


def room_of(settings: dict[str, Any], match: int) -> int:
    """The most nodes after a match of this length."""
    factor, offset = settings["max_spec_factor"], settings["max_spec_offset"]
    return min(int(settings["max_spec_tokens"]), int(match * factor + offset))


def published_tree(
    texts: list[list[int]], context: list[int], max_depth: int, settings: dict[str, float]
) -> SuffixTree:
    """The tree of SuffixDecoding over some texts."""
    index = published_index(texts)

    def grow(places: Sequence[int], match: int) -> SuffixTree:
        limits = {"min_prob": settings["min_token_prob"], "deepest": max_depth - match}
        return expand(index, places, match, room_of(settings, match), edge=share, **limits)

    tree = best_tree(index.find(context, max_depth), range(1, max_depth + 1), grow)
    assert tree is not None
    return tree


def naive_score(
    texts: list[list[int]], context: list[int], max_depth: int, settings: dict[str, float]
) -> tuple[float, int, list[float]]:
    """Score, match length and probabilities of SuffixDecoding, by counting every string."""
    strings = [
        tuple(text[start : start + length])
        for text in texts
        for start in range(len(text))
        for length in range(1, min(max_depth, len(text) - start) + 1)
    ]
    counts = {string: strings.count(string) for string in set(strings)}
    vocabulary = {token for text in texts for token in text}
    best = (-1.0, 0, [0.0])
    for match in range(1, max_depth + 1):
        suffix = tuple(context[-match:])
        if len(suffix) < match or suffix not in counts:
            break
        factor, offset = settings["max_spec_factor"], settings["max_spec_offset"]
        room = min(settings["max_spec_tokens"], int(match * factor + offset))
        probs: list[float] = []
        queue = [(1.0, suffix)]
        while queue and len(probs) <= room:
            queue.sort(key=lambda entry: -entry[0])
            prob, string = queue.pop(0)
            probs.append(prob)
            for token in sorted(vocabulary):
                child = (*string, token)
                after = prob * counts.get(child, 0) / counts[string]
                if after >= settings["min_token_prob"]:
                    queue.append((after, child))
        if sum(probs[1:]) >= best[0] - 1e-9:
            best = (sum(probs[1:]), match, probs[1:])
    return best


class TestPublished:
    @needs_fixtures
    def test_trees_of_arctic_inference(self):
        compared = 0
        for draft, texts, context, max_depth in published_drafts():
            if not draft["use_tree_spec"]:
                continue
            tree = published_tree(texts, context, max_depth, draft)
            assert tree.score == pytest.approx(draft["score"], abs=1e-4)
            assert tree.match == draft["match_len"]
            np.testing.assert_allclose(sorted(tree.probs[1:]), sorted(draft["probs"]), atol=1e-5)
            compared += 1
        assert compared == 48

    @needs_fixtures
    def test_chains_of_arctic_inference(self):
        """They take the best child at every node; where counts tie, one of the best."""
        compared = 0
        for draft, texts, context, max_depth in published_drafts():
            if draft["use_tree_spec"]:
                continue
            match, minimum = draft["match_len"], draft["min_token_prob"]
            index = published_index(texts)
            found = index.find(context, max_depth)
            places = [place for place, length in found.items() if length >= match]
            deepest = max_depth - match
            tree = expand(
                index, places, match, 10_000, edge=share, min_prob=minimum, deepest=deepest
            )
            children, node = tree.children(), 0
            for token, prob in zip(draft["token_ids"], draft["probs"], strict=True):
                best = max(tree.probs[child] for child in children[node])
                node = next(child for child in children[node] if tree.tokens[child] == token)
                assert tree.probs[node] == pytest.approx(best) == pytest.approx(prob, abs=1e-5)
            assert sum(draft["probs"]) == pytest.approx(draft["score"], abs=1e-4)
            assert not children[node] or len(draft["probs"]) == room_of(draft, match)
            compared += 1
        assert compared == 48

    @pytest.mark.parametrize(("factor", "offset"), [(1.0, 0.0), (2.0, 1.0)])
    def test_trees_equal_those_of_counted_strings(self, factor, offset):
        rng = np.random.default_rng(0)
        settings = {
            "max_spec_tokens": 8,
            "max_spec_factor": factor,
            "max_spec_offset": offset,
            "min_token_prob": 0.1,
        }
        for _ in range(30):
            texts = [rng.integers(0, 3, 25).tolist() for _ in range(2)]
            context = texts[0][: int(rng.integers(4, 25))]
            tree = published_tree(texts, context, 7, settings)
            score, match, probs = naive_score(texts, context, 7, settings)
            assert tree.score == pytest.approx(score)
            assert tree.match == match
            np.testing.assert_allclose(sorted(tree.probs[1:]), sorted(probs))


class TestIndex:
    def test_places_equal_those_of_a_search(self):
        rng = np.random.default_rng(1)
        text: list[int] = []
        index = SuffixIndex(occurrences=ALL)
        for _ in range(60):
            new = rng.integers(0, 4, int(rng.integers(1, 8))).tolist()
            text += new
            index.extend(new)
            expected = {}
            for place in range(1, len(text)):
                length = 0
                while length < min(place, MAX_MATCH) and (
                    text[place - 1 - length] == text[len(text) - 1 - length]
                ):
                    length += 1
                if length >= min(ORDERS):
                    expected[place] = length
            assert index.find(text) == expected

    def test_only_the_latest_occurrences_are_compared(self):
        index = SuffixIndex(occurrences=3)
        index.extend([1, 2, 3] * 50)
        assert sorted(index.find([8, 1, 2])) == [143, 146, 149]

    def test_texts_of_an_index_do_not_run_into_each_other(self):
        index = SuffixIndex()
        for text in ([1, 2, 3], [4, 5, 6]):
            index.extend([*text, SEPARATOR])
        places = list(index.find([1, 2]))
        tree = expand(index, places, 2, 9, edge=share, min_prob=0.1, deepest=9)
        assert tree.tokens[1:] == [3]
        assert index.find([3, 4]) == {}

    def test_memory_grows_with_the_text(self):
        index = SuffixIndex()
        for _ in range(100):
            index.extend(range(1000))
        assert index.nbytes <= 36 * 100_000


class TestDrafter:
    def test_a_long_match_gives_a_long_chain(self):
        text = list(range(60))
        drafter = SuffixDrafter([*text, *text[:20]])
        proposal = drafter.propose(40, 30)
        assert proposal is not None
        tree = tree_of(proposal, 19, 40)
        assert tree.is_chain
        assert tree.tokens.tolist() == text[19:50]
        assert tree.matches.tolist() == [0, *range(20, 50)]
        assert math.exp(tree.log_probs[1]) > 0.9

    def test_nothing_is_proposed_without_a_match(self):
        assert SuffixDrafter(list(range(50))).propose(16, 16) is None
        assert SuffixDrafter([1]).propose(16, 16) is None

    def test_proposals_are_bounded(self):
        drafter = SuffixDrafter([1] * 400)
        proposal = drafter.propose(1000, 1000)
        assert len(proposal) <= MAX_NODES + 1
        assert len(drafter.propose(5, 1000) or ()) <= 5
        assert len(drafter.propose(1000, 2) or ()) == 3

    def test_rates_are_learned_by_length_of_the_match(self):
        """Continuations that are always wrong become improbable, at this length alone."""
        rng = np.random.default_rng(3)
        drafter = SuffixDrafter([])
        for number in range(30):
            first = 1000 + 10 * number
            drafter.observe([first, first + 1, first + 2, *rng.integers(0, 900, 5), first])
            drafter.observe([first + 1])
            proposal = drafter.propose(4, 4)
            assert proposal.lengths[1] == 2
            drafter.observe([first + 3])
        assert proposal.probs[1] <= 0.1
        text = list(range(2000, 2040))
        drafter.observe([*text, *text[:8]])
        proposal = drafter.propose(4, 4)
        assert proposal.probs[1] > 0.7


def random_table(rng: np.random.Generator, depths: int) -> TransitionTable:
    tokens = np.stack([rng.permutation(6)[:4] for _ in range(depths)]).astype(np.int32)
    log_probs = np.log(-np.sort(-rng.dirichlet(np.ones(5), depths)[:, :4], axis=1))
    return TransitionTable.from_marginals(tokens, log_probs.astype(np.float32))


def naive_merge(table: TransitionTable, proposal: SuffixTree) -> dict[tuple[int, ...], float]:
    """The log probabilities of all paths of a table of marginals and a proposal, by tokens."""
    copies: dict[tuple[int, ...], float] = {}
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(proposal)):
        parent = proposal.parents[node]
        paths.append((*paths[parent], proposal.tokens[node]))
        copies[paths[node]] = math.log(proposal.probs[node] / proposal.probs[parent])
    edges = dict(copies)
    # A path is of the table, of the proposal, or of both: not first of one and then of the other.
    for depth in range(1, table.depths + 1):
        for ranks in itertools.product(range(table.tokens.shape[2]), repeat=depth):
            path = tuple(int(table.tokens[d, 0, rank]) for d, rank in enumerate(ranks))
            edge = float(table.log_probs[depth - 1, 0, ranks[-1]])
            edges[path] = max(edges.get(path, -math.inf), edge)
    return {path: sum(edges[path[: n + 1]] for n in range(len(path))) for path in edges}


class TestMerge:
    def test_merged_paths_are_the_best_of_both(self):
        rng = np.random.default_rng(4)
        for _ in range(40):
            table = random_table(rng, 3)
            text = rng.integers(0, 6, 40).tolist()
            proposal = SuffixDrafter([*text, *text[10:16]]).propose(12, 12)
            assert proposal is not None
            tree = merge(table, proposal, text[15], 24)
            expected = naive_merge(table, proposal)
            paths = [path[1:] for path in token_paths(tree)[1:]]
            assert len(set(paths)) == len(paths) == 23
            np.testing.assert_allclose(tree.log_probs[1:], [expected[path] for path in paths])
            best = sorted(expected.values(), reverse=True)[:23]
            np.testing.assert_allclose(tree.log_probs[1:], best)
            assert (tree.depths == [0, *map(len, paths)]).all()
            assert tree.matches is not None
            assert (tree.matches > 0).any()

    def test_confidences_are_those_of_the_rows(self):
        tokens = np.array([[[3, 4]], [[5, 6]]], np.int32)
        log_probs = np.log(np.full((2, 1, 2), 0.4, np.float32))
        next_row = np.array([[[0, 0]], [[-1, -1]]], np.int32)
        confidences = np.array([[0.5], [0.25]], np.float32)
        table = TransitionTable(tokens, log_probs, next_row, confidences)
        tree = merge(table, SuffixTree(0), 1, 4)
        assert tree.confidences[0] == 1
        assert set(tree.confidences[tree.depths == 1]) == {0.5}
        assert set(tree.confidences[tree.depths == 2]) == {0.25}


ANSWER = [50 + n for n in range(40)]


def lengths_of(scheduler: Scheduler, salt: str = "", method: str = "suffix") -> list[int]:
    """Tokens of each pass of an answer."""
    config = DecodeConfig(
        method=method,
        budget=16,
        max_tokens=len(ANSWER),
        draft_temperature=0.5,  # type: ignore[arg-type]
    )
    request = Request(prompt_ids=PROMPT, config=config, cache_salt=salt)
    steps = [step for _, step in scheduler.decode([request])]
    assert tokens_of(steps) == ANSWER
    return [len(step.tokens) for step in steps]


class TestCache:
    def test_a_finished_answer_is_copied_with_the_same_salt_alone(self):
        backend = scripted([*PROMPT, *ANSWER])
        scheduler = Scheduler(backend, suffix_cache=SuffixCache(1 << 20))
        assert max(lengths_of(scheduler, "a")) == 1
        assert max(lengths_of(scheduler, "b")) == 1
        assert len(lengths_of(scheduler, "a")) < 8
        assert max(lengths_of(Scheduler(backend), "a")) == 1

    def test_the_oldest_indices_are_dropped(self):
        cache = SuffixCache(50_000)
        for number in range(200):
            cache.add("a" if number % 2 else "b", range(100 * number, 100 * number + 60))
            assert cache.nbytes <= 50_000
        found = [index.find([19_900, 19_901]) for index in cache.indices("a")]
        assert any(found)
        assert not any(index.find([100, 101]) for index in cache.indices("a"))


class TestBudget:
    def test_a_good_copy_replaces_the_draft(self):
        budget = AdaptiveBudget(VerifyCosts({1: 1.0, 8: 1.1, 32: 1.5}))
        chain = DraftTree.chain(np.arange(20, dtype=np.int32), np.log(0.9) * np.arange(20))
        assert not budget.prefers_copy(chain, 100)  # nothing was drafted yet
        drafted = DraftTree.chain(np.arange(8, dtype=np.int32))
        for _ in range(20):
            seconds = {"draft": 0.5, "verify": 1.1}
            budget.observe([drafted], [np.arange(3, dtype=np.int32)], [100], seconds)
        assert budget.prefers_copy(chain, 100)
        assert not budget.prefers_copy(chain.subset(np.arange(2)), 100)

    @pytest.mark.parametrize("drafts", [True, False])
    def test_copies_that_fail_are_not_verified_for_long(self, drafts):
        """A text whose every third token is new only looks like its earlier parts."""
        budget = AdaptiveBudget(VerifyCosts({1: 1.0, 8: 1.4, 32: 3.0}))
        text = [token for number in range(1000) for token in (1, 2, 10 + number)]
        suffix, done, seconds, failed = SuffixDrafter(text[:8]), 8, 0.0, 0
        drafted = DraftTree.chain(np.arange(8, dtype=np.int32))
        while done + 3 < len(text):
            phases, path, proposal = {}, np.zeros(1, np.int32), suffix.propose(32, 31)
            tree = DraftTree.root_only(0) if proposal is None else tree_of(proposal, 0, 32)
            if drafts and not (len(tree) > 1 and budget.prefers_copy(tree, 100)):
                tree, phases, path = drafted, {"draft": 1.5}, np.arange(3, dtype=np.int32)
            elif len(tree) > 1:
                tree = tree.subset(budget.prune([tree], [100])[0])
                failed += len(tree) > 1
            phases["verify"] = float(budget.costs.predict([len(tree)], [0])[0])
            budget.observe([tree], [path], [100], phases)
            suffix.observe(text[done : done + len(path)])
            done, seconds = done + len(path), seconds + sum(phases.values())
        rate = 3 / 2.9 if drafts else 1.0
        assert failed > 0
        assert (done - 8) / seconds > 0.97 * rate
