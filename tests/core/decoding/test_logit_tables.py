"""Tables from logits equal the tables of the reference, which has its own code."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.logit_tables import head_table, marginal_table
from treeflash.errors import NumericalError
from treeflash.reference.backend import load
from treeflash.testing.comparisons import assert_equal_tables
from treeflash.testing.models import write_dialect, write_target
from treeflash.testing.pairs import LOAD
from treeflash.testing.trees import draft, noise_of_depths


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """A pair with a Markov head, whose scores are the marginals' and a low-rank bias."""
    folder = tmp_path_factory.mktemp("pair")
    write_target(folder / "target", "llama", seed=1)
    write_dialect(folder / "drafter", folder / "target", "deepspec", seed=2)
    return load(folder / "target", folder / "drafter", LOAD)


SIZES = list(product((1, 4, 100), (1, 5, 100), (None, 1, 8, 100), (None, 1, 7, 100)))


@pytest.mark.sample(2)
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tables_of_all_sizes(backend, temperature, noisy):
    block, root = draft(backend, [3, 1, 4, 1, 5])
    logits = backend.drafter.model.logits(block.hidden)
    first, second = (backend.drafter_model.head_tensors[f"markov_w{n}.weight"] for n in (1, 2))

    def score(slots, previous, tokens):
        return logits[slots][:, tokens] + first[previous] @ second[tokens].T

    def confidence(slots, previous):
        return np.array(
            [
                backend.head.scores.confidence(block.hidden[[slot]], np.array([[token]]))[0, 0]
                for slot, token in zip(slots, previous, strict=True)
            ],
            np.float32,
        )

    options = TableOptions(k=9, temperature=temperature)
    if noisy:
        options = replace(options, noise=noise_of_depths(backend, 0.8))
    (expected,) = backend.drafter.marginals([block], options)
    assert_equal_tables(marginal_table(logits, options), expected)
    for m, k, shortlist, rows in SIZES:
        options = replace(options, m=m, k=k, shortlist=shortlist, rows=rows)
        (expected,) = backend.head.transitions([block], options)
        table = head_table(logits, root, score, options, confidence)
        assert_equal_tables(table, expected)


def test_a_single_depth_has_the_row_of_the_root_alone():
    logits = np.array([[0, 2, 1]], np.float32)
    options = TableOptions(m=1, k=2, shortlist=2, rows=1)
    table = head_table(logits, 0, lambda slots, before, tokens: logits[slots][:, tokens], options)
    assert table.tokens.tolist() == [[[1, 2]]]
    assert_equal_tables(table, marginal_table(logits, options))


def test_tokens_that_cannot_be_drafted_have_no_rows():
    logits = np.array([[1, -np.inf, 0], [0, -np.inf, 1]], np.float32)
    options = TableOptions(m=3, k=3)
    table = head_table(logits, 0, lambda slots, before, tokens: logits[slots], options)
    assert np.isfinite(table.log_probs).sum(-1).max() == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("shortlist", [None, 2])
def test_logits_that_are_not_finite_are_refused(value, shortlist):
    logits = np.zeros((3, 5), np.float32)
    logits[1, 2] = value
    options = TableOptions(m=2, k=2, shortlist=shortlist)
    for table in (
        lambda: marginal_table(logits, options),
        lambda: head_table(logits, 0, lambda slots, before, x: logits[slots][:, x], options),
    ):
        with pytest.raises(NumericalError, match="the drafter's output is not finite"):
            table()
