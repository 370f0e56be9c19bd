"""The check at load: targets that pass, and each way of failing it."""

import types

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.probe import check_trees, tree_difference
from treeflash.decoding.tree import DraftTree
from treeflash.errors import NumericalError, UnsupportedModelError
from treeflash.reference import numerics
from treeflash.reference.backend import ReferenceBackend, load
from treeflash.reference.verifier import Verifier
from treeflash.testing.models import write_target


@pytest.fixture
def backend(tmp_path):
    write_target(tmp_path, "llama", seed=1)
    return load(tmp_path, None, LoadConfig())


class SiblingLeak(Verifier):
    def logits(self, tree):
        causal = np.tri(len(tree), dtype=np.bool_)
        return self._forward(tree.tokens, tree.positions(self.length), causal)


class PositionIsColumn(Verifier):
    def logits(self, tree):
        positions = self.length + np.arange(len(tree), dtype=np.int32)
        return self._forward(tree.tokens, positions, tree.ancestor_mask())


class LeakInLargeTrees(Verifier):
    """As if a kernel for more than 8 rows ignored the mask."""

    def logits(self, tree):
        return SiblingLeak.logits(self, tree) if len(tree) > 8 else super().logits(tree)


class ColumnsInLargeTrees(Verifier):
    def logits(self, tree):
        return PositionIsColumn.logits(self, tree) if len(tree) > 8 else super().logits(tree)


class CommitsFirstRows(Verifier):
    """The cache keeps the tree's first rows instead of the accepted ones."""

    def commit(self, path):
        return super().commit(np.arange(len(path), dtype=np.int32))


class CommitsWholeTree(Verifier):
    def commit(self, path):
        rows = len(self.cache.pending[0][0][0])
        return super().commit(np.arange(rows, dtype=np.int32))


class ForgetsLastRow(Verifier):
    def commit(self, path):
        whole = path[-1] == len(path) - 1  # a prompt
        return super().commit(path if whole else path[:-1])


class PositionCountsRejected(Verifier):
    """After a commit, positions count every row that was run, accepted or not."""

    rejected = 0

    def logits(self, tree):
        positions = tree.positions(self.length + self.rejected)
        return self._forward(tree.tokens, positions, tree.ancestor_mask())

    def commit(self, path):
        self.rejected += len(self.cache.pending[0][0][0]) - len(path)
        return super().commit(path)


class Crash(Verifier):
    def logits(self, tree: DraftTree):
        if len(tree) > 1:
            raise IndexError("two rows at once")
        return super().logits(tree)


class NotFinite(Verifier):
    def logits(self, tree: DraftTree):
        raise NumericalError("overflow")


def broken(backend: ReferenceBackend, verifier: type[Verifier]) -> ReferenceBackend:
    backend.verifier = lambda *, features: verifier(backend.target, ())
    return backend


@pytest.mark.parametrize("seed", range(5))
def test_a_target_that_branches_passes(backend, seed):
    check_trees(backend, seed)


@pytest.mark.parametrize(
    ("verifier", "where"),
    {
        SiblingLeak: "on",
        PositionIsColumn: "on",
        LeakInLargeTrees: "on",
        ColumnsInLargeTrees: "on",
        CommitsFirstRows: "after",
        CommitsWholeTree: "after",
        ForgetsLastRow: "after",
        PositionCountsRejected: "after",
    }.items(),
)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_target_that_does_not_is_refused(backend, verifier, where, seed, dtype):
    backend.dtype = dtype  # the wider tolerance still tells them apart
    expected = rf"other logits {where} a draft tree .*differ by .*--method ar still works"
    with pytest.raises(UnsupportedModelError, match=expected):
        check_trees(broken(backend, verifier), seed)


@pytest.mark.parametrize("verifier", [LeakInLargeTrees, CommitsFirstRows])
def test_a_small_tree_alone_would_not_notice(backend, verifier):
    assert tree_difference(broken(backend, verifier), np.random.default_rng(0)) < 1e-4


def test_a_target_of_few_positions_passes(tmp_path):
    write_target(tmp_path, "llama", seed=1, max_positions=16)
    check_trees(load(tmp_path, None, LoadConfig()))


class WrongMask(Verifier):
    def logits(self, tree):
        mask = tree.ancestor_mask()[:, :-1] if len(tree) > 1 else tree.ancestor_mask()
        return self._forward(tree.tokens, tree.positions(self.length), mask)


def test_an_error_of_the_backend_is_not_one_of_the_model(backend):
    """It would be reported as an unsupported model, and mended by nobody."""
    with pytest.raises(ValueError, match="broadcast"):
        check_trees(broken(backend, WrongMask))


def test_an_error_of_the_backend_below_a_framework_is_not_one_of_the_model(backend, monkeypatch):
    """NumPy's own Python code raises it, called by the backend."""

    def attention(*args):
        return np.linalg.inv(np.zeros((2, 3)))

    attention = types.FunctionType(attention.__code__, vars(numerics))
    monkeypatch.setattr("treeflash.reference.target.attention", attention)
    with pytest.raises(np.linalg.LinAlgError):
        check_trees(backend)


def test_a_crash_of_the_model_is_a_refusal_that_says_why(backend):
    with pytest.raises(UnsupportedModelError, match=r"two rows at once.*--method ar") as caught:
        check_trees(broken(backend, Crash))
    assert isinstance(caught.value.__cause__, IndexError)


def test_other_errors_pass_through(backend):
    with pytest.raises(NumericalError, match="overflow"):
        check_trees(broken(backend, NotFinite))
