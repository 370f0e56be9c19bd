"""The decode loop with the reference backend, beside the laws of its conformance suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from treeflash.config import METHODS, DecodeConfig, LoadConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.adaptive_budget import AdaptiveBudget, AdaptiveBudgets
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.reference.backend import load as load_reference
from treeflash.testing.comparisons import generate, steps_of, tokens_of
from treeflash.testing.models import write_drafter, write_target

DRAFTING = METHODS[1:]
PROMPT = (3, 1, 4, 1, 5, 9, 2)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    folder = tmp_path_factory.mktemp("pair")
    return pair_in(folder, max_positions=400)


def pair_in(folder: Path, **target: Any) -> Backend:
    write_target(folder / "target", "llama", seed=18, **target)
    write_drafter(folder / "drafter", folder / "target", seed=118)
    return load_reference(folder / "target", folder / "drafter", LoadConfig())


def test_trees_save_forward_passes(reference):
    """The equalities would mean little if no draft were ever accepted."""
    for method in ("ddtree", "treeflash"):
        config = DecodeConfig(method=method, budget=64, max_tokens=48)
        _, *iterations = decode(reference, Request(prompt_ids=PROMPT, config=config))
        assert len(tokens_of(iterations)) == 47
        assert 47 / len(iterations) > 1.5


def test_end_tokens_inside_paths(reference):
    """Each token once as the end token: the sequence ends where that token first occurs."""
    config = DecodeConfig(budget=64, max_tokens=48)
    sequence = generate(reference, PROMPT, config)
    inside = 0
    for end in set(sequence):
        stops = frozenset({end, *set(range(24)) - set(sequence)})
        steps = steps_of(reference, PROMPT, replace(config, stop_token_ids=stops))
        assert tokens_of(steps) == sequence[: sequence.index(end) + 1]
        assert steps[-1].finish_reason == "stop"
        inside += steps[-1].path is not None and len(steps[-1].tokens) < len(steps[-1].path)
    assert inside > 0


def test_the_models_limit(tmp_path):
    backend = pair_in(tmp_path, max_positions=30)
    plain = generate(backend, PROMPT, DecodeConfig(method="ar"))
    assert len(plain) == 23
    budgets = AdaptiveBudgets()  # which time forward passes once for all methods
    for method in DRAFTING:
        request = Request(prompt_ids=PROMPT, config=DecodeConfig(method=method))
        steps = list(decode(backend, request, budgets))
        assert tokens_of(steps) == plain
        assert steps[-1].finish_reason == "length"


class EverySecond(AdaptiveBudget):
    """Drafts in every second iteration, whole trees."""

    drafts = False

    def begin(self, sequences: int = 1) -> bool:
        self.drafts = not self.drafts
        return self.drafts

    def prune(
        self, trees: Sequence[DraftTree], lengths: Sequence[int], other_rows: int = 0
    ) -> list[NDArray[np.int64]]:
        return [np.arange(len(tree)) for tree in trees]

    def observe(self, *_: object, **__: object) -> None:
        """Learn nothing, because drafts would depend on the time that they take here."""


def test_features_of_iterations_without_a_draft_reach_the_drafter(reference):
    """Lost ones would change no token, but every later draft would lack context."""
    states = []

    class Recorded:
        def __getattr__(self, name: str) -> Any:
            return getattr(reference, name)

        def open(self, capacity: int, *, drafts: bool) -> Any:
            states.append(reference.open(capacity, drafts=drafts))
            return states[-1]

    config = DecodeConfig(method="ddtree", budget="auto", max_tokens=80)
    budgets = AdaptiveBudgets(by_method={"ddtree": EverySecond(VerifyCosts({1: 1.0, 16: 1.0}))})
    committed, lengths = len(PROMPT) - 1, []
    for step in decode(
        cast(Backend, Recorded()), Request(prompt_ids=PROMPT, config=config), budgets
    ):
        if step.table is not None and step.finish_reason is None:
            lengths.append((states[0].drafter.length, committed))
        committed += len(step.tokens)
    assert len(lengths) > 3
    assert all(known == root for known, root in lengths)
