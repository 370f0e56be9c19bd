"""Penalties per node against counting along each path; decoding with them is exact."""

from __future__ import annotations

import numpy as np
import pytest

from treeflash.config import METHODS, DecodeConfig, LoadConfig, Penalties, SamplingConfig
from treeflash.decoding.sampling import PenaltyState
from treeflash.decoding.tree import DraftTree
from treeflash.reference.backend import load
from treeflash.testing.comparisons import generate, path_to, random_tokens, random_tree

VOCAB = 12
PENALTIES = {
    "repetition": Penalties(repetition=1.3),
    "reward": Penalties(repetition=0.7),
    "presence": Penalties(presence=0.8),
    "frequency": Penalties(frequency=-0.4),
    "bias": Penalties(logit_bias=((3, 2.5), (11, -100.0))),
    "all": Penalties(repetition=1.2, presence=0.5, frequency=0.3, logit_bias=((5, 1.0),)),
}


def penalised(logits, penalties, prompt, generated):
    """One row of logits, after counting a sequence token by token."""
    row = logits.astype(np.float64)
    for token in range(len(row)):
        count = generated.count(token)
        if count or token in prompt:
            row[token] = (
                row[token] / penalties.repetition
                if row[token] > 0
                else row[token] * penalties.repetition
            )
        row[token] += dict(penalties.logit_bias).get(token, 0.0)
        row[token] -= penalties.presence * (count > 0) + penalties.frequency * count
    return row


@pytest.mark.parametrize("penalties", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("nodes", [1, 2, 30])
def test_each_node_counts_its_own_path(penalties, nodes):
    rng = np.random.default_rng(nodes)
    prompt, generated = random_tokens(rng, VOCAB, 3), random_tokens(rng, VOCAB, 6)
    state = PenaltyState(penalties, prompt)
    state.add(generated[:2])
    state.add(generated[2:])
    tree = random_tree(rng, generated[-1], nodes, VOCAB)
    logits = rng.normal(0, 2, (nodes, VOCAB)).astype(np.float32)
    found = state.edits(tree).apply(logits)
    for node in range(nodes):
        below = tree.tokens[path_to(tree, node)[1:]].tolist()
        expected = penalised(logits[node], penalties, prompt, generated + below)
        np.testing.assert_allclose(found[node], expected, atol=1e-5)


def test_tokens_outside_the_tree_are_not_counted_node_by_node(monkeypatch):
    """A bias may have all tokens of the vocabulary, and the prompt many."""
    columns, ancestor_mask = [], DraftTree.ancestor_mask

    class Recorded(np.ndarray):
        def __matmul__(self, other):
            columns.append(other.shape[1])
            return np.asarray(self) @ other

    monkeypatch.setattr(DraftTree, "ancestor_mask", lambda tree: ancestor_mask(tree).view(Recorded))
    state = PenaltyState(Penalties(repetition=1.3), range(10_000))
    state.edits(random_tree(np.random.default_rng(0), 3, 30, 10_000))
    assert columns
    assert max(columns) < 30


def test_no_penalty_changes_nothing():
    assert PenaltyState(Penalties(), [1, 2]).edits(DraftTree.root_only(2)) is None


@pytest.fixture
def backend(tiny_pair):
    return load(*tiny_pair, LoadConfig())


@pytest.mark.sample(4)
@pytest.mark.parametrize("penalties", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize(
    "sampling", [SamplingConfig(), SamplingConfig(temperature=0.9, seed=5)], ids=["greedy", "seed"]
)
def test_decoding_equals_plain_decoding(backend, penalties, sampling):
    def tokens(method, penalties=penalties):
        config = DecodeConfig(
            method=method, budget=12, max_tokens=24, sampling=sampling, penalties=penalties
        )
        return generate(backend, [5, 6, 7, 5], config)

    plain = tokens("ar")
    assert len(plain) == 24
    for method in METHODS[1:]:
        assert tokens(method) == plain


@pytest.mark.parametrize(
    "penalties", [Penalties(repetition=2.0), Penalties(presence=2.0), Penalties(frequency=2.0)]
)
def test_penalties_change_the_text(backend, penalties):
    """The equalities would mean little otherwise."""
    plain, penalised = (
        generate(backend, [5, 6, 7, 5], DecodeConfig(method="ar", max_tokens=24, penalties=each))
        for each in (Penalties(), penalties)
    )
    assert penalised != plain
