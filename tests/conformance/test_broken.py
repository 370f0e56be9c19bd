"""Backends and batches that are broken on purpose, each in one way that a named test catches."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from treeflash.decoding.interfaces import Verify
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.tree import DraftTree
from treeflash.reference.backend import load as load_reference
from treeflash.reference.drafter import Drafter
from treeflash.reference.heads import ARHead, Corrected
from treeflash.reference.verifier import State, Verifier
from treeflash.testing import batches

MODULE = """
import pytest
from treeflash.testing import BackendSuite

class TestConformance(BackendSuite):
    @pytest.fixture
    def load(self, loader):
        return loader
"""


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


def run_suite(folder, loader, *names):
    """Run tests of the suite by name; returns the outcomes."""
    module = folder / "test_generated.py"
    module.write_text(MODULE)
    settings = folder / "pytest.ini"
    options = "-q -p no:cacheprovider --disable-plugin-autoload --import-mode=importlib"
    settings.write_text(f"[pytest]\naddopts = {options}\n")
    run = Run(loader)
    options = ["-c", str(settings), f"--rootdir={folder}", f"--basetemp={folder / 'tmp'}"]
    tests = [f"{module}::TestConformance::{name}" for name in names]
    pytest.main([*options, *tests], plugins=[run])
    return run


class LeakyTree(DraftTree):
    def ancestor_mask(self):
        return np.tril(np.ones((len(self), len(self)), np.bool_))


class ColumnTree(DraftTree):
    def positions(self, start):
        return np.arange(start, start + len(self), dtype=np.int32)


class TwistedVerifier(Verifier):
    tree_class: type[DraftTree]

    def forward(self, state, tree):
        return super().forward(
            state, self.tree_class(tree.tokens, tree.parents, tree.depths, tree.log_probs)
        )


class SiblingLeak(TwistedVerifier):
    """A node sees all nodes before it."""

    tree_class = LeakyTree


class PositionIsColumn(TwistedVerifier):
    """A node stands where it is in the list, not where it is in the text."""

    tree_class = ColumnTree


class StaleRow(Verifier):
    """The cache keeps the tree's first rows instead of the accepted ones."""

    def commit_one(self, state, outputs, path):
        self.commit_rows(state, outputs, rows_cached=np.arange(len(path)), rows_read=path)

    def commit_rows(self, state, outputs, rows_cached, rows_read):
        committed = state.kv_cache.committed
        super().commit_one(state, outputs, rows_read)
        state.kv_cache.committed = committed
        state.kv_cache.commit(rows_cached)


class StaleFeatures(StaleRow):
    """The drafter gets the tree's first rows instead of the accepted ones."""

    def commit_one(self, state, outputs, path):
        self.commit_rows(state, outputs, rows_cached=path, rows_read=np.arange(len(path)))


class WrongBonus(Verifier):
    """A leaf gets the choice of its parent."""

    def run(self, work):
        found = super().run(work)
        for item, sampled in zip(work, found.sampled, strict=True):
            if isinstance(item, Verify):
                tree = item.tree
                leaves = np.setdiff1d(np.arange(1, len(tree)), tree.parents)
                sampled.tokens[leaves] = sampled.tokens[tree.parents[leaves]]
        return found


class PositionBlindSampler(Verifier):
    """The same noise for the whole tree."""

    def run(self, work):
        def blind(item):
            keys = item.params and item.params.keys
            if keys is None:
                return item
            return replace(item, params=replace(item.params, keys=np.resize(keys[0], keys.shape)))

        return super().run([blind(item) for item in work])


class OffByOneScores(Corrected):
    def score(self, hidden, logits, previous, tokens):
        return super().score(hidden, logits, np.roll(previous, 1, axis=0), tokens)


class PreviousOffByOne(ARHead):
    """A depth is given the previous-token candidates of the depth before it."""

    def __init__(self, model, scores):
        super().__init__(model, OffByOneScores(model))


class SwappedChunks(ARHead):
    """Gate and up are taken for each other."""

    def __init__(self, model, scores):
        super().__init__(model, scores)
        for name in ("ug.weight", "ug.bias"):
            tensor = model.head_tensors[name]
            model.head_tensors[name] = np.concatenate(np.split(tensor, 2)[::-1])


class NoiseOfMarginalsAlone(ARHead):
    """The scores of the head have no noise."""

    def transitions_one(self, block, options):
        table = super().transitions_one(block, options)
        plain = super().transitions_one(block, replace(options, noise=None))
        return replace(table, log_probs=plain.log_probs)


class NoiseOfTheDepthBefore(ARHead):
    """A depth has the noise of the one before it."""

    def transitions_one(self, block, options):
        if (noise := options.noise) is not None:
            options = replace(options, noise=replace(noise, keys=np.roll(noise.keys, 1, 0)))
        return super().transitions_one(block, options)


class RootBeforeAll(ARHead):
    """Log probabilities of every depth are those after the root."""

    def log_probs(self, block, previous):
        return super().log_probs(block, np.full_like(previous, previous[0]))


class SwappedTexts(Verifier):
    """Texts with equally large trees get each other's tokens."""

    def run(self, work):
        found = super().run(work)
        trees = [i for i, item in enumerate(work) if isinstance(item, Verify)]
        for i, j in pairwise(trees):
            if len(work[i].tree) == len(work[j].tree):
                sampled = found.sampled
                mine, theirs = sampled[i].tokens, sampled[j].tokens
                sampled[i], sampled[j] = (
                    replace(sampled[i], tokens=theirs),
                    replace(sampled[j], tokens=mine),
                )
        return found


class SwappedBlocks(Drafter):
    """Texts get each other's blocks."""

    def draft(self, roots, depths=None):
        return super().draft(roots, depths)[::-1]


class SwappedNoise(Drafter):
    """Texts are drafted with each other's noise."""

    def marginals(self, blocks, options):
        if (noise := options.noise) is not None:
            keys = np.concatenate([x.keys for x in noise.split(len(blocks))[::-1]])
            options = replace(options, noise=replace(noise, keys=keys))
        return super().marginals(blocks, options)


class RowOfAnotherText(Verifier):
    """The first row of a text is what another one left there."""

    left = ()

    def commit_one(self, state, outputs, path):
        is_first = state.length == 0
        super().commit_one(state, outputs, path)
        if is_first:
            for own, left in zip(state.kv_cache.committed, self.left, strict=False):
                for array, row in zip(own, left, strict=True):
                    array[:, :1] = row
        self.left = [[x[:, :1].copy() for x in layer] for layer in state.kv_cache.committed]


class OffsetOfTheTextThatLeft(Verifier):
    """A text that moves up in the batch stands where the text before it stood."""

    def __init__(self, target):
        super().__init__(target)
        self.batch, self.lengths, self.starts = [], [], {}

    def run(self, work):
        states = [item.state for item in work]
        gone = [i for i, state in enumerate(self.batch) if state not in states]
        self.starts = {states[i]: self.lengths[i] for i in gone if i < len(states) > 1}
        self.batch, self.lengths = states, [state.length for state in states]
        return super().run(work)

    def forward(self, state, tree):
        positions = tree.positions(self.starts.get(state, state.length))
        return self.target.forward(tree.tokens, positions, tree.ancestor_mask(), state.kv_cache)


class ChangedChoices(Verifier):
    """The choices at trees are changed."""

    def run(self, work):
        trees = [item for item in work if isinstance(item, Verify)]
        return super().run(
            [replace(x, params=self.change(x.params, trees)) if x in trees else x for x in work]
        )


class MaskOfAnotherNode(ChangedChoices):
    """A node has the bitmask of the node before it."""

    def change(self, params, trees):
        if params.allowed is None:
            return params
        return replace(params, allowed=np.roll(params.allowed, 1, 0))


class NoiseOfAnotherText(ChangedChoices):
    """All texts have the noise of the first one."""

    def change(self, params, trees):
        if params.keys is None:
            return params
        first = next(x.params.keys for x in trees if x.params.keys is not None)
        return replace(params, keys=np.resize(first, params.keys.shape))


class PenaltiesOfOneTextAlone(ChangedChoices):
    """Edits are made for the first text of a batch only."""

    def change(self, params, trees):
        return params if params is trees[0].params else replace(params, edits=None)


class ForkOfLaterRows(State):
    """A fork to a shorter length has the keys of the positions one later."""

    def fork(self, length, capacity):
        new = super().fork(length, capacity)
        if length < self.length:
            later = [k[:, 1 : length + 1].copy() for k, _ in self.kv_cache.committed]
            values = [v for _, v in new.kv_cache.committed]
            new.kv_cache.committed = list(zip(later, values, strict=True))
        return new


class ForkThatSharesMemory(State):
    """A fork writes where the text that it comes from does."""

    def fork(self, length, capacity):
        new = super().fork(length, capacity)
        if length == self.length:
            new.kv_cache = self.kv_cache
        return new


class ForkWithoutFeatures(State):
    """A fork lacks the features that the drafter has not read yet."""

    def fork(self, length, capacity):
        new = super().fork(length, capacity)
        new.context = []
        return new


class TruncationOfTheTargetAlone(State):
    """The drafter keeps the positions that were dropped."""

    def truncate(self, length):
        self.kv_cache.truncate(length)


class OneTokenTooMany(PrefixCache):
    """The prefix that is found is longer than what is shared."""

    def find(self, prompt):
        found = super().find(prompt)
        return found and (found[0], min(found[1] + 1, found[0].length))


SCHEDULE = "test_texts_of_a_schedule_equal_texts_alone"
STATES = "test_states_equal_prefills_after_forks_and_truncations"
BROKEN = {
    SiblingLeak: "test_nodes_see_their_paths_alone",
    PositionIsColumn: "test_nodes_see_their_paths_alone",
    StaleRow: "test_verifier_cache_equals_prefill",
    StaleFeatures: "test_drafter_cache_equals_prefill",
    WrongBonus: "test_iterations_of_each_family_match_reference",
    PositionBlindSampler: "test_choices_match_reference",
    PreviousOffByOne: "test_transitions_match_reference",
    SwappedChunks: "test_transitions_match_reference",
    NoiseOfMarginalsAlone: "test_noise_is_added_to_logits",
    NoiseOfTheDepthBefore: "test_noise_is_added_to_logits",
    RootBeforeAll: "test_log_probs_match_reference",
    SwappedTexts: SCHEDULE,
    SwappedNoise: "test_drafts_of_a_batch_equal_those_alone",
    SwappedBlocks: "test_drafts_of_a_batch_equal_those_alone",
    RowOfAnotherText: SCHEDULE,
    OffsetOfTheTextThatLeft: SCHEDULE,
    MaskOfAnotherNode: SCHEDULE,
    NoiseOfAnotherText: SCHEDULE,
    PenaltiesOfOneTextAlone: SCHEDULE,
    ForkOfLaterRows: STATES,
    ForkThatSharesMemory: STATES,
    ForkWithoutFeatures: STATES,
    TruncationOfTheTargetAlone: STATES,
    OneTokenTooMany: SCHEDULE,
}


def break_part(backend, part):
    """Put a broken part into a backend of the reference."""
    model = backend.drafter_model
    if issubclass(part, ARHead):
        backend.head = part(model, Corrected(model))
    elif issubclass(part, Verifier):
        backend.verifier = part(backend.target)
    elif issubclass(part, Drafter):
        backend.drafter = part(model, None)
    elif issubclass(part, State):
        backend.open = lambda capacity, *, drafts: part(
            backend.target, model if drafts else None, capacity
        )


@pytest.mark.parametrize(("part", "name"), BROKEN.items(), ids=[part.__name__ for part in BROKEN])
def test_a_broken_part_fails(tmp_path, monkeypatch, part, name):
    def load(target, drafter, config):
        backend = load_reference(target, drafter, config)
        break_part(backend, part)
        return backend

    if issubclass(part, State):
        monkeypatch.setattr("treeflash.reference.verifier.State", part)  # of forks too
    if issubclass(part, PrefixCache):
        monkeypatch.setattr(batches, "PrefixCache", part)
    # A crash would prove nothing: the test must have compared something and found it wrong.
    message = run_suite(tmp_path, load, name).failed[name]
    assert message.startswith(("AssertionError", "assert"))


def test_sound_parts_pass(tmp_path):
    run = run_suite(tmp_path, load_reference, *sorted(set(BROKEN.values())))
    assert run.passed == set(BROKEN.values())
    assert not run.failed
