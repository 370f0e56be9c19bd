"""Exact mode: what is computed for a position depends bit for bit on the tokens before it alone."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Backend, Loader
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash.testing.batches import (
    plain_tokens,
    run_schedule,
    sampled_log_probs,
    scheduler_configs,
    scheduler_of,
    schedules,
)
from treeflash.testing.comparisons import path_to, random_tokens, random_tree, tokens_of
from treeflash.testing.pairs import Pair, repeated

few = settings(repeated, max_examples=3)


class ExactTests:
    exact_dtypes: ClassVar[tuple[str, ...]]

    @pytest.fixture
    def exact(self, load: Loader, models: Pair, exact_dtype: str) -> Backend:
        """The pair in exact mode."""
        return load_exact(load, models, exact_dtype)

    def test_exact_mode_is_refused_or_exact(self, load: Loader, models: Pair) -> None:
        assert models.tested.inexact
        if not self.exact_dtypes:
            with pytest.raises((ConfigError, UnsupportedModelError), match="exact"):
                load(models.target, models.drafter, LoadConfig(dtype="float32", exact=True))
        for dtype in self.exact_dtypes:
            assert load_exact(load, models, dtype).inexact is None

    @few
    @given(data=st.data())
    def test_exact_schedules_equal_plain_decoding(
        self, exact: Backend, data: st.DataObject
    ) -> None:
        """Sequences that join and leave, trees of all methods, and prefix-cache hits."""
        backend = exact
        sequences = data.draw(schedules(backend.vocab_size))
        sequences = [
            replace(x, config=replace(x.config, log_probs=3), constrained=False) for x in sequences
        ]
        cache = PrefixCache(1 << 30)
        scheduler = scheduler_of(backend, data.draw(scheduler_configs), cache)
        steps = run_schedule(scheduler, sequences)
        cache.close()
        for sequence, together in zip(sequences, steps, strict=True):
            plain = replace(sequence, config=replace(sequence.config, method="ar"), cancelled=None)
            (alone,) = run_schedule(scheduler_of(backend), [plain])
            emitted = tokens_of(together)
            assert emitted == plain_tokens(backend, sequence)[: len(emitted)]
            actual = sampled_log_probs(together)
            np.testing.assert_array_equal(actual, sampled_log_probs(alone)[: len(actual)])

    @few
    @given(seed=st.integers(0, 10**6))
    def test_exact_logits_are_equal_in_trees_batches_chunks_and_forks(
        self, exact: Backend, seed: int
    ) -> None:
        backend = exact
        rng = np.random.default_rng(seed)
        tokens = random_tokens(rng, backend.vocab_size, int(rng.integers(110, 140)))
        tree = random_tree(rng, tokens[-1], int(rng.integers(2, 60)), backend.vocab_size)
        with SequenceSession(backend) as chunked, SequenceSession(backend) as plain:
            end = int(rng.integers(1, len(tokens)))
            chunked.extend(tokens[:end])
            chunked.extend(tokens[end:])
            plain.extend(tokens)
            fork = chunked.state.fork(end, 500)
            logits = backend.verifier.logits([(chunked.state, tree), (fork, tree)])
            for node in path_to(tree, int(rng.integers(len(tree)))):
                root = DraftTree.root_only(int(tree.tokens[node]))
                np.testing.assert_array_equal(plain.logits(root)[0], logits[0][node])
                plain.commit(np.zeros(1, np.int32))
            with SequenceSession(backend) as short:
                short.extend(tokens[:end])
                np.testing.assert_array_equal(short.logits(tree), logits[1])
            fork.close()


def load_exact(load: Loader, models: Pair, dtype: str) -> Backend:
    """The pair in exact mode."""
    return load(models.target, models.drafter, LoadConfig(dtype=dtype, exact=True))
