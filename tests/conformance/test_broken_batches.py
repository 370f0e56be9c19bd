"""Batches that are broken on purpose, each in one way, each caught by a test with a name."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from suite_runs import run_suite

from treeflash.decoding.interfaces import Verify
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.reference.backend import load as load_reference
from treeflash.reference.drafter import Drafter
from treeflash.reference.verifier import State, Verifier
from treeflash.testing import batches


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


class StaleRow(Verifier):
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
    SwappedTexts: SCHEDULE,
    SwappedNoise: "test_drafts_of_a_batch_equal_those_alone",
    SwappedBlocks: "test_drafts_of_a_batch_equal_those_alone",
    StaleRow: SCHEDULE,
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


@pytest.mark.parametrize(("part", "name"), BROKEN.items(), ids=[part.__name__ for part in BROKEN])
def test_broken_batch_fails(tmp_path, monkeypatch, part, name):
    def load(target, drafter, config):
        backend = load_reference(target, drafter, config)
        if issubclass(part, Verifier):
            backend.verifier = part(backend.target)
        elif issubclass(part, Drafter):
            backend.drafter = part(backend.drafter_model, None)
        elif issubclass(part, State):
            model = backend.drafter_model
            backend.open = lambda capacity, *, drafts: part(
                backend.target, model if drafts else None, capacity
            )
        return backend

    if issubclass(part, State):
        monkeypatch.setattr("treeflash.reference.verifier.State", part)  # of forks too
    if issubclass(part, PrefixCache):
        monkeypatch.setattr(batches, "PrefixCache", part)
    # A crash would prove nothing: the test must have compared something and found it wrong.
    message = run_suite(tmp_path, load, name).failed[name]
    assert message.startswith(("AssertionError", "assert"))


def test_sound_batches_pass(tmp_path):
    run = run_suite(tmp_path, load_reference, *sorted(set(BROKEN.values())))
    assert run.passed == set(BROKEN.values())
    assert not run.failed
