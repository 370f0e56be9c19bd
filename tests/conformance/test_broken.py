"""Backends that are broken on purpose, each in one way, each caught by a test with a name."""

import numpy as np
import pytest

from treeflash.decoding.sampling import choose
from treeflash.decoding.tree import DraftTree
from treeflash.reference.backend import ReferenceBackend
from treeflash.reference.backend import load as load_reference
from treeflash.reference.head import ARHead
from treeflash.reference.verifier import Verifier

MODULE = """
import pytest
from treeflash.testing import BackendSuite

class TestConformance(BackendSuite):
    @pytest.fixture
    def load(self, loader):
        return loader
"""


class LeakyTree(DraftTree):
    def ancestor_mask(self):
        return np.tril(np.ones((len(self), len(self)), np.bool_))


class ColumnTree(DraftTree):
    def positions(self, start):
        return np.arange(start, start + len(self), dtype=np.int32)


class TwistedVerifier(Verifier):
    tree_class: type[DraftTree]

    def logits(self, tree):
        return super().logits(
            self.tree_class(tree.tokens, tree.parents, tree.depths, tree.log_probs)
        )


class SiblingLeak(TwistedVerifier):
    """A node sees all nodes before it."""

    tree_class = LeakyTree


class PositionIsColumn(TwistedVerifier):
    """A node stands where it is in the list, not where it is in the text."""

    tree_class = ColumnTree


class StaleRow(Verifier):
    """The cache keeps the tree's first rows instead of the accepted ones."""

    def commit(self, path):
        return self._commit(rows_cached=np.arange(len(path)), rows_returned=path)

    def _commit(self, rows_cached, rows_returned):
        committed = self.cache.committed
        features = super().commit(rows_returned)
        self.cache.committed = committed
        self.cache.commit(rows_cached)
        return features


class StaleFeatures(StaleRow):
    """The drafter gets the tree's first rows instead of the accepted ones."""

    def commit(self, path):
        return self._commit(rows_cached=path, rows_returned=np.arange(len(path)))


class WrongBonus(Verifier):
    """A leaf gets the choice of its parent."""

    def verify(self, tree, sampling, uniforms):
        chosen = super().verify(tree, sampling, uniforms)
        leaves = np.setdiff1d(np.arange(1, len(tree)), tree.parents)
        chosen[leaves] = chosen[tree.parents[leaves]]
        return chosen


class PositionBlindSampler(Verifier):
    """One random number for the whole tree."""

    def verify(self, tree, sampling, uniforms):
        if uniforms is not None:
            uniforms = np.full_like(uniforms, uniforms[0])
        return choose(self.logits(tree), sampling, uniforms)


class PreviousOffByOne(ARHead):
    """A depth is given the previous-token candidates of the depth before it."""

    def _correct(self, hidden, previous):
        return super()._correct(hidden, np.roll(previous, 1, axis=0))


class SwappedChunks(ARHead):
    """Gate and up are taken for each other."""

    def __init__(self, model):
        super().__init__(model)
        for name in ("ug.weight", "ug.bias"):
            tensor = model.head_tensors[name]
            model.head_tensors[name] = np.concatenate(np.split(tensor, 2)[::-1])


class RootBeforeAll(ARHead):
    """Log probabilities of every depth are those after the root."""

    def log_probs(self, block, previous):
        return super().log_probs(block, np.full_like(previous, previous[0]))


class BrokenBackend(ReferenceBackend):
    def __init__(self, backend, part):
        super().__init__(backend.target, backend.drafter_model)
        self.part = part
        if issubclass(part, ARHead):
            self.head = part(self.drafter_model)

    def verifier(self, *, features):
        sound = super().verifier(features=features)
        if issubclass(self.part, ARHead):
            return sound
        return self.part(sound.target, sound.layer_ids)


class Run:
    """A plugin that provides the loader, and notes which tests passed and which failed, how."""

    def __init__(self, loader):
        self.sound_or_broken = loader
        self.passed = set()
        self.failed = {}

    @pytest.fixture
    def loader(self):
        return self.sound_or_broken

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::")[-1].split("[")[0]
        if report.failed:
            self.failed[name] = report.longrepr.reprcrash.message
        elif report.when == "call":
            self.passed.add(name)


BROKEN = {
    SiblingLeak: "test_nodes_see_their_paths_alone",
    PositionIsColumn: "test_nodes_see_their_paths_alone",
    StaleRow: "test_verifier_cache_equals_prefill",
    StaleFeatures: "test_drafter_cache_equals_prefill",
    WrongBonus: "test_iterations_of_each_family_match_reference",
    PositionBlindSampler: "test_choices_match_reference",
    PreviousOffByOne: "test_transitions_match_reference",
    SwappedChunks: "test_transitions_match_reference",
    RootBeforeAll: "test_log_probs_match_reference",
}


def run_suite(folder, loader, *names):
    module = folder / "test_generated.py"
    module.write_text(MODULE)
    settings = folder / "pytest.ini"
    settings.write_text("[pytest]\naddopts = -q -p no:cacheprovider --import-mode=importlib\n")
    run = Run(loader)
    options = ["-c", str(settings), f"--rootdir={folder}", f"--basetemp={folder / 'tmp'}"]
    tests = [f"{module}::TestConformance::{name}" for name in names]
    pytest.main([*options, *tests], plugins=[run])
    return run


@pytest.mark.parametrize(("part", "name"), BROKEN.items(), ids=[part.__name__ for part in BROKEN])
def test_broken_backend_fails(tmp_path, part, name):
    def load(target, drafter, config):
        return BrokenBackend(load_reference(target, drafter, config), part)

    # A crash would prove nothing: the test must have compared something and found it wrong.
    message = run_suite(tmp_path, load, name).failed[name]
    assert message.startswith(("AssertionError", "assert"))


def test_sound_backend_passes(tmp_path):
    run = run_suite(tmp_path, load_reference, *sorted(set(BROKEN.values())))
    assert run.passed == set(BROKEN.values())
    assert not run.failed
