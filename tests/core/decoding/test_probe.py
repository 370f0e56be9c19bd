import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.probe import check_trees
from treeflash.decoding.tree import DraftTree
from treeflash.errors import NumericalError, UnsupportedModelError
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


@pytest.mark.parametrize("verifier", [SiblingLeak, PositionIsColumn])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_target_that_does_not_is_refused(backend, verifier, seed, dtype):
    backend.dtype = dtype  # the wider tolerance still tells them apart
    with pytest.raises(UnsupportedModelError, match=r"differ by .*--method ar still works"):
        check_trees(broken(backend, verifier), seed)


def test_a_crash_is_a_refusal_that_says_why(backend):
    with pytest.raises(UnsupportedModelError, match=r"two rows at once.*--method ar") as caught:
        check_trees(broken(backend, Crash))
    assert isinstance(caught.value.__cause__, IndexError)


def test_other_errors_pass_through(backend):
    with pytest.raises(NumericalError, match="overflow"):
        check_trees(broken(backend, NotFinite))
