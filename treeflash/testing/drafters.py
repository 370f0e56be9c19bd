"""Drafters of every published dialect: tables, generations, and refusals by name."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from treeflash.config import DecodeConfig, Method, SamplingConfig
from treeflash.decoding import decode
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Loader
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import build_chain, build_tree
from treeflash.decoding.verify_costs import SIZES, VerifyCosts
from treeflash.errors import UnsupportedModelError
from treeflash.testing.comparisons import (
    TOLERANCE,
    assert_close,
    assert_equal_tables,
    paths,
    tokens_of,
)
from treeflash.testing.dialects import DIALECTS, write_dialect
from treeflash.testing.generations import DRAFTING, check_generation
from treeflash.testing.models import write_target
from treeflash.testing.pairs import DRAFTER_SEED, LOAD, TARGET_SEED, PairMaker
from treeflash.testing.texts import random_tokens
from treeflash.testing.transitions import draft, marginals, noise_of_depths, transitions

AUTO: dict[str, Any] = {"max_tokens": 16, "budget": "auto"}
SAMPLED = SamplingConfig(temperature=1.0, seed=3)


class DrafterTests:
    """Mixin of `BackendSuite`."""

    dialects: ClassVar[tuple[str, ...]]
    families: ClassVar[tuple[str, ...]]

    def test_tables_of_a_dialect_match_reference(self, pair: PairMaker, dialect: str) -> None:
        models = pair(drafter={"dialect": dialect})
        prompt = random_tokens(np.random.default_rng(2), models.reference.vocab_size, 9)
        noise = noise_of_depths(models.reference, 0.8)
        for k, temperature, added in ((4, 1.0, None), (100, 0.7, None), (100, 0.7, noise)):
            assert_equal_tables(
                *(marginals(backend, prompt, k, temperature, added) for backend in models.both)
            )
        if models.reference.head is None:
            assert models.tested.head is None
            return
        sizes = ((3, 4, None, None), (100, 100, None, None), (4, 4, 8, 6))
        for (m, k, shortlist, rows), added in product(sizes, (None, noise)):
            assert_equal_tables(
                *(
                    transitions(backend, prompt, m, k, 0.7, shortlist, rows, added)
                    for backend in models.both
                )
            )

    def test_tables_of_several_texts_with_a_dialect_are_those_of_each(
        self, pair: PairMaker, dialect: str
    ) -> None:
        backend = pair(drafter={"dialect": dialect}).tested
        assert backend.drafter is not None
        rng = np.random.default_rng(4)
        texts = [TextSession(backend, drafts=True) for _ in range(3)]
        roots = [text.extend(random_tokens(rng, backend.vocab_size, 6)) for text in texts]
        states = [(text.state, root) for text, root in zip(texts, roots, strict=True)]
        together = backend.drafter.draft(states)
        alone = [backend.drafter.draft([state])[0] for state in states]
        tables = backend.drafter.marginals(together, 4, 1.0)
        for table, block in zip(tables, alone, strict=True):
            assert_equal_tables(table, backend.drafter.marginals([block], 4, 1.0)[0])
        if backend.head is None:
            return
        for shortlist in (None, 8):
            tables = backend.head.transitions(together, 3, 4, 1.0, shortlist=shortlist)
            for table, block in zip(tables, alone, strict=True):
                (own,) = backend.head.transitions([block], 3, 4, 1.0, shortlist=shortlist)
                assert_equal_tables(table, own)

    def test_fewer_depths_of_a_dialect_are_the_first_ones(
        self, pair: PairMaker, dialect: str
    ) -> None:
        """Of one text and of several; a depth's output does not depend on how many are wanted."""
        backend = pair(drafter={"dialect": dialect}).tested
        assert backend.drafter is not None
        rng = np.random.default_rng(6)
        texts = [TextSession(backend, drafts=True) for _ in range(2)]
        roots = [text.extend(random_tokens(rng, backend.vocab_size, 6)) for text in texts]
        states = [(text.state, root) for text, root in zip(texts, roots, strict=True)]

        def tables(depths: int | None) -> list[TransitionTable]:
            assert backend.drafter is not None
            blocks = backend.drafter.draft(states, depths)
            found = backend.drafter.marginals(blocks, 4, 1.0)
            # A recurrent head has a row for each path instead of each token.
            if backend.head is not None and dialect not in ("deepspec-rnn", "specforge-domino"):
                found += backend.head.transitions(blocks, 3, 4, 1.0)
            return found

        every = tables(None)
        for depths in (1, 2, every[0].depths, every[0].depths + 1):
            for few, whole in zip(tables(depths), every, strict=True):
                assert few.depths == min(depths, whole.depths)
                assert_equal_tables(few, whole.until(depths))

    def test_log_probs_of_a_dialect_match_reference(self, pair: PairMaker, dialect: str) -> None:
        models = pair(drafter={"dialect": dialect})
        prompt = random_tokens(np.random.default_rng(1), models.reference.vocab_size, 5)
        found = []
        for backend in models.both:
            assert backend.drafter is not None
            assert backend.drafter_config is not None
            block, root = draft(backend, prompt)
            found.append([backend.drafter.log_probs(block)])
            depths = backend.drafter_config.depths
            assert found[-1][0].shape == (depths, backend.vocab_size)
            if backend.head is not None:
                previous = np.array([root, *range(2, depths + 1)], np.int32)
                found[-1].append(backend.head.log_probs(block, previous))
        for actual, expected in zip(*found, strict=True):
            assert_close(actual, expected)

    def test_tables_of_a_dialect_are_its_log_probs(self, pair: PairMaker, dialect: str) -> None:
        """Each child's, after the tokens of its own path."""
        backend = pair(drafter={"dialect": dialect}).tested
        assert backend.drafter_config is not None
        if backend.head is None:
            return
        prompt = random_tokens(np.random.default_rng(3), backend.vocab_size, 5)
        block, root = draft(backend, prompt)
        (table,) = backend.head.transitions([block], 8, 4, 1.0)
        depths, chain = backend.drafter_config.depths, build_chain(table, root, 24)
        for tree in (build_tree(table, root, 24), chain):
            for node, path in enumerate(paths(tree)[1:], 1):
                before = np.resize(np.array(path[:-1], np.int32), depths)
                row = backend.head.log_probs(block, before)[len(path) - 2]
                step = tree.log_probs[node] - tree.log_probs[tree.parents[node]]
                assert step == pytest.approx(row[path[-1]], abs=TOLERANCE)
        if backend.drafter_config.head_state_size:  # else a row may be missing
            assert len(chain) == depths + 1
            (narrow,) = backend.head.transitions([block], 1, 1, 1.0)
            assert build_chain(narrow, root, 24).tokens.tolist() == chain.tokens.tolist()

    @pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLED], ids=["greedy", "seeded"])
    def test_generations_with_a_dialect_match_reference(
        self, pair: PairMaker, dialect: str, sampling: SamplingConfig
    ) -> None:
        """Step by step; and the tokens are those of plain decoding."""
        models = pair(drafter={"dialect": dialect})
        for method in DRAFTING if models.reference.head else DRAFTING[:2]:
            check_generation(
                models,
                DecodeConfig(method=method, budget=24, sampling=sampling, max_tokens=12),
            )

    def test_budget_auto_with_a_dialect_equals_plain_decoding(
        self, pair: PairMaker, dialect: str
    ) -> None:
        """With the corrections that it learns, by depth and by confidence."""
        models = pair(drafter={"dialect": dialect})
        prompt = random_tokens(np.random.default_rng(5), models.tested.vocab_size, 6)
        budget = AdaptiveBudget(VerifyCosts({size: 1 + 0.01 * size for size in SIZES}))
        method: Method = "ddtree" if models.tested.head is None else "treeflash"
        steps = list(decode(models.tested, prompt, DecodeConfig(method=method, **AUTO), budget))
        assert tokens_of(steps) == tokens_of(
            list(decode(models.tested, prompt, DecodeConfig(method="ar", **AUTO)))
        )
        config = models.tested.drafter_config
        assert config is not None
        by_level = any(isinstance(key, tuple) for key in budget.expected)
        assert by_level == config.confidence_head

    def test_other_dialects_are_refused(self, load: Loader, tmp_path: Path) -> None:
        write_target(tmp_path / "target", self.families[0], seed=TARGET_SEED)
        for dialect in DIALECTS.keys() - set(self.dialects):
            write_dialect(tmp_path / dialect, tmp_path / "target", dialect, seed=DRAFTER_SEED)
            with pytest.raises(UnsupportedModelError, match="does not support a drafter with"):
                load(tmp_path / "target", tmp_path / dialect, LOAD)
