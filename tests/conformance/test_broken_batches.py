"""Batches that are broken on purpose, each in one way, each caught by a test with a name."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from suite_runs import run_suite

from treeflash.decoding.interfaces import Verification
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.reference.backend import load as load_reference
from treeflash.reference.drafter import Drafter
from treeflash.reference.state import State
from treeflash.reference.verifier import Verifier
from treeflash.testing import schedules


class SwappedTexts(Verifier):
    """Texts with equally large trees get each other's tokens."""

    def run(self, work):
        found = super().run(work)
        trees = [i for i, item in enumerate(work) if isinstance(item, Verification)]
        for i, j in pairwise(trees):
            if len(work[i].tree) == len(work[j].tree):
                mine, theirs = found[i].tokens, found[j].tokens
                found[i], found[j] = (
                    replace(found[i], tokens=theirs),
                    replace(found[j], tokens=mine),
                )
        return found


class SwappedBlocks(Drafter):
    """Texts get each other's blocks."""

    def draft(self, roots, depths=None):
        return super().draft(roots, depths)[::-1]


class SwappedNoise(Drafter):
    """Texts are drafted with each other's noise."""

    def marginals(self, blocks, k, temperature, noise=None):
        if noise is not None:
            noise = replace(
                noise, keys=np.concatenate([x.keys for x in noise.split(len(blocks))[::-1]])
            )
        return super().marginals(blocks, k, temperature, noise)


class StaleRow(Verifier):
    """The first row of a text is what another one left there."""

    left = ()

    def commit_one(self, state, path):
        is_first = state.length == 0
        super().commit_one(state, path)
        if is_first:
            for own, left in zip(state.cache.committed, self.left, strict=False):
                for array, row in zip(own, left, strict=True):
                    array[:, :1] = row
        self.left = [[x[:, :1].copy() for x in layer] for layer in state.cache.committed]


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
        logits, state.outputs = self.target.forward(
            tree.tokens, positions, tree.ancestor_mask(), state.cache
        )
        return logits


class ChangedChoices(Verifier):
    """The choices at trees are changed."""

    def run(self, work):
        trees = [item for item in work if isinstance(item, Verification)]
        return super().run(
            [replace(x, choice=self.change(x.choice, trees)) if x in trees else x for x in work]
        )


class MaskOfAnotherNode(ChangedChoices):
    """A node has the bitmask of the node before it."""

    def change(self, choice, trees):
        if choice.allowed is None:
            return choice
        return replace(choice, allowed=np.roll(choice.allowed, 1, 0))


class NoiseOfAnotherText(ChangedChoices):
    """All texts have the noise of the first one."""

    def change(self, choice, trees):
        if choice.keys is None:
            return choice
        first = next(x.choice.keys for x in trees if x.choice.keys is not None)
        return replace(choice, keys=np.resize(first, choice.keys.shape))


class PenaltiesOfOneTextAlone(ChangedChoices):
    """Edits are made for the first text of a batch only."""

    def change(self, choice, trees):
        return choice if choice is trees[0].choice else replace(choice, edits=None)


class ForkOfLaterRows(State):
    """A fork to a shorter length has the keys of the positions one later."""

    def fork(self, length, capacity):
        new = super().fork(length, capacity)
        if length < self.length:
            later = [k[:, 1 : length + 1].copy() for k, _ in self.cache.committed]
            values = [v for _, v in new.cache.committed]
            new.cache.committed = list(zip(later, values, strict=True))
        return new


class ForkThatSharesMemory(State):
    """A fork writes where the text that it comes from does."""

    def fork(self, length, capacity):
        new = super().fork(length, capacity)
        if length == self.length:
            new.cache = self.cache
        return new


class ForkWithoutFeatures(State):
    """A fork lacks the features that the drafter has not read yet."""

    def fork(self, length, capacity):
        new = super().fork(length, capacity)
        new.features = new.features[:0]
        return new


class TruncationOfTheTargetAlone(State):
    """The drafter keeps the positions that were dropped."""

    def truncate(self, length):
        self.cache.truncate(length)


class OneTokenTooMany(PrefixCache):
    """The prefix that is found is longer than what is shared."""

    def find(self, key, tokens):
        found = super().find(key, tokens)
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
        monkeypatch.setattr("treeflash.reference.state.State", part)  # of forks too
    if issubclass(part, PrefixCache):
        monkeypatch.setattr(schedules, "PrefixCache", part)
    # A crash would prove nothing: the test must have compared something and found it wrong.
    message = run_suite(tmp_path, load, name).failed[name]
    assert message.startswith(("AssertionError", "assert"))


def test_sound_batches_pass(tmp_path):
    run = run_suite(tmp_path, load_reference, *sorted(set(BROKEN.values())))
    assert run.passed == set(BROKEN.values())
    assert not run.failed
