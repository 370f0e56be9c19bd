"""Log probabilities of whole vocabularies agree with the reference, and with the tables."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from treeflash.decoding.interfaces import Backend
from treeflash.drafters.treeflash import HEADS
from treeflash.testing.comparisons import assert_close
from treeflash.testing.pairs import PairMaker
from treeflash.testing.texts import random_tokens
from treeflash.testing.transitions import draft

M, K = 3, 4


class LogProbTests:
    """Mixin of `BackendSuite`."""

    @pytest.mark.parametrize("head", HEADS)
    def test_log_probs_match_reference(self, pair: PairMaker, head: str) -> None:
        models = pair(drafter={"head": head})
        prompt = prompt_of(models.reference)
        actual, expected = (log_probs(backend, prompt) for backend in models.both)
        assert_close(actual, expected)
        np.testing.assert_allclose(np.exp(actual).sum(-1), 1, rtol=1e-5)

    @pytest.mark.parametrize("head", HEADS)
    def test_tables_are_the_best_of_log_probs(self, pair: PairMaker, head: str) -> None:
        backend = pair(drafter={"head": head}).tested
        assert backend.head is not None
        assert backend.drafter is not None
        block, root = draft(backend, prompt_of(backend))
        (best,) = backend.drafter.marginals([block], K, 1.0)
        assert_best(backend.drafter.log_probs(block), best.tokens[:, 0], best.log_probs[:, 0])
        (best,) = backend.drafter.marginals([block], M, 1.0)
        candidates = best.tokens[:-1, 0]
        (table,) = backend.head.transitions([block], M, K, 1.0)
        for m in range(M):
            previous = np.concatenate([[root], candidates[:, m]]).astype(np.int32)
            rows = backend.head.log_probs(block, previous)
            first = 0 if m == 0 else 1  # depth 1 has one row
            assert_best(rows[first:], table.tokens[first:, m], table.log_probs[first:, m])


def assert_best(
    rows: NDArray[np.float32], tokens: NDArray[np.int32], best: NDArray[np.float32]
) -> None:
    """A table's (n, K) children are the most probable tokens of (n, vocab) rows."""
    assert_close(np.take_along_axis(rows, tokens, -1), best)
    assert_close(-np.sort(-rows, axis=-1)[:, : best.shape[1]], best)


def log_probs(backend: Backend, prompt: list[int]) -> NDArray[np.float32]:
    """(2, D, vocab) of the drafter and of the head, the latter after arbitrary tokens."""
    assert backend.head is not None
    assert backend.drafter is not None
    block, root = draft(backend, prompt)
    marginals = backend.drafter.log_probs(block)
    others = random_tokens(np.random.default_rng(1), backend.vocab_size, len(marginals) - 1)
    previous = np.array([root, *others], np.int32)
    return np.stack([marginals, backend.head.log_probs(block, previous)])


def prompt_of(backend: Backend) -> list[int]:
    """A prompt of seven tokens."""
    return random_tokens(np.random.default_rng(0), backend.vocab_size, 7)
