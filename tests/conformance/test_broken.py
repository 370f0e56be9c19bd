"""Backends that are broken on purpose, each in one way, each caught by a test with a name."""

from dataclasses import replace

import numpy as np
import pytest
from suite_runs import run_suite

from treeflash.decoding.interfaces import Verify
from treeflash.decoding.tree import DraftTree
from treeflash.reference.backend import ReferenceBackend
from treeflash.reference.backend import load as load_reference
from treeflash.reference.heads import ARHead, Corrected
from treeflash.reference.verifier import Verifier


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


class BrokenBackend(ReferenceBackend):
    def __init__(self, backend, part):
        super().__init__(backend.target, backend.drafter_model)
        if issubclass(part, ARHead):
            self.head = part(self.drafter_model, Corrected(self.drafter_model))
        else:
            self.verifier = part(self.target)


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
}


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
