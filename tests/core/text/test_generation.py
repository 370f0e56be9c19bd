"""Figures of a generation, from steps made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from treeflash.config import SEEDS, DecodeConfig, SamplingConfig
from treeflash.decoding.loop import Step
from treeflash.decoding.tree import DraftTree
from treeflash.text.generation import PHASES, Generation, mean
from treeflash.text.stream import Assembler

BACKEND = SimpleNamespace(name="none", device="cpu", dtype="float32", inexact=None)
LETTERS = SimpleNamespace(
    special_token_ids=frozenset(),
    stop_token_ids=frozenset(),
    byte_token_ids=frozenset(),
    decode=lambda token_ids: "".join(chr(ord("a") + token) for token in token_ids),
)
"""Each token is a letter."""
PREFILL = Step((0,), {"prefill": 2.0})
SECONDS = {"draft": 0.1, "tree": 0.2, "verify": 0.3, "commit": 0.4}


def generate(*lengths: int, stop: str | None = None) -> Generation:
    """Return the generation of a prefill and iterations that committed these numbers of tokens."""
    assembler = Assembler(BACKEND, LETTERS, (1, 2), DecodeConfig(), () if stop is None else (stop,))
    assembler.add(PREFILL)
    first = 1
    for length in lengths:
        tokens = tuple(range(first, first + length))
        first += length
        tree = DraftTree.root_only(1)
        if assembler.add(Step(tokens, SECONDS, tree, np.zeros(1, np.int32))).finish_reason:
            break
    return assembler.generation()


def test_figures():
    found = generate(3, 1, 4, 3)
    assert len(found.token_ids) == 12
    assert found.accepted_lengths == [3, 1, 4, 3]
    assert found.block_efficiency == 11 / 4
    assert found.prefill_s == 2
    assert found.decode_s == pytest.approx(4)
    assert found.tokens_per_s == pytest.approx(11 / 4)
    assert found.histogram == {1: 1, 3: 2, 4: 1}
    assert list(found.histogram) == [1, 3, 4]
    assert found.seconds == pytest.approx(
        {"prefill": 2, "draft": 0.4, "tree": 0.8, "verify": 1.2, "commit": 1.6}
    )


@pytest.mark.parametrize(
    ("found", "tokens", "efficiency"),
    [
        (Assembler(BACKEND, LETTERS, (1, 2), DecodeConfig()).generation(), 0, 0),
        (generate(), 1, 0),  # a prefill is no iteration
        (generate(1, 1, 1), 4, 1),
    ],
)
def test_little_or_nothing_was_generated(found, tokens, efficiency):
    assert (len(found.token_ids), found.block_efficiency) == (tokens, efficiency)
    assert len(found.accepted_lengths) == max(0, tokens - 1) == sum(found.histogram.values())
    assert (found.tokens_per_s > 0) == (efficiency > 0)
    assert found.seconds.keys() == dict.fromkeys(PHASES).keys()


@pytest.mark.parametrize(
    ("stop", "text", "lengths"),
    [
        ("x", "abcdefgh", [3, 1, 3]),  # nothing is cut
        ("gh", "abcdef", [3, 1, 3]),
        ("g", "abcdef", [3, 1, 2]),
        ("ef", "abcd", [3, 1, 1]),  # an iteration begins within the stop string
        ("e", "abcd", [3, 1]),
        ("cd", "ab", [3]),
        ("b", "a", [1]),
    ],
)
def test_a_stop_string_cuts_an_iteration(stop, text, lengths):
    """Its tokens count up to the one that completed the string; its time was spent all the same."""
    found = generate(3, 1, 3, stop=stop)
    assert found.text == text
    assert found.accepted_lengths == lengths
    assert len(found.token_ids) == 1 + sum(lengths)
    assert found.decode_s == pytest.approx(len(lengths))


@pytest.mark.parametrize(("budget", "expected"), [("auto", 2), (4, 0)])
def test_iterations_without_a_draft_are_counted(budget, expected):
    root, chain = DraftTree.root_only(0), DraftTree.chain(np.zeros(2, np.int32), np.zeros(2))
    assembler = Assembler(BACKEND, LETTERS, (1, 2), DecodeConfig(budget=budget))
    for tree, seconds in ((None, {}), (root, {"draft": 1.0}), (root, {}), (chain, {}), (root, {})):
        assembler.add(Step((1,), seconds, tree))
    assert assembler.generation().paused_iterations == expected


def test_mean():
    assert mean([1, 2, 6]) == 3
    assert mean(iter([0.5])) == 0.5
    assert mean([]) == 0


@pytest.mark.parametrize("seed", [SEEDS - 1, np.uint64(SEEDS - 1)])
def test_answers_to_a_prompt_differ_in_their_seeds(seed):
    config = DecodeConfig(sampling=SamplingConfig(seed=seed))
    first = Assembler(BACKEND, LETTERS, (1, 2), config, ("a",), scores_prompt=True)
    answers = first.answers(3)
    assert [x.config.sampling.seed for x in answers] == [SEEDS - 1, 0, 1]
    assert [x.scores_prompt for x in answers] == [True, False, False]
    assert {(x.prompt_ids, x.stop) for x in answers} == {((1, 2), ("a",))}
    assert len({id(x.chunks) for x in answers}) == 3
