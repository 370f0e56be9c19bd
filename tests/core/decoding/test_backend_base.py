"""Base classes of backends: snapshots, commits by forward pass, and convolutions along trees."""

from types import SimpleNamespace

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.backend_base import (
    MAX_SNAPSHOTS,
    NEWEST_SNAPSHOTS,
    CommittedPath,
    Outputs,
    PassRows,
    Snapshots,
    arrays_nbytes,
    by_outputs,
)
from treeflash.decoding.families import refusal
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.reference.backend import load
from treeflash.reference.verifier import Verifier


def test_the_latest_snapshots_are_kept_and_some_that_are_spread_over_the_prompt():
    snapshots = Snapshots()
    for length in range(1, 11):
        snapshots.take(10 * length, f"at {length}")
        assert len(list(snapshots)) <= MAX_SNAPSHOTS
    assert list(snapshots)[-NEWEST_SNAPSHOTS:] == ["at 9", "at 10"]
    older = [snapshots.longest(length) for length in (60, 80)]
    assert 20 <= older[0] < older[1]
    assert snapshots.get(100) == "at 10"
    assert list(snapshots.copy(95))[-1] == "at 9"
    snapshots.truncate(older[0])
    assert list(snapshots) == [f"at {older[0] // 10}"]


def test_the_end_of_a_prompt_is_kept_beside_the_snapshots_on_the_way():
    """The snapshot before the prompt's last token is where other prompts fork most often."""
    snapshots = Snapshots()
    for length in (2048, 4096, 6144, 8192, 8200, 8300):
        snapshots.take(length, length)
    assert list(snapshots) == [4096, 8192, 8200, 8300]


def test_arrays_are_counted_once():
    array = np.zeros(3, np.float32)
    assert arrays_nbytes([array, np.zeros(2, np.float32), array]) == 20


def test_commits_are_grouped_by_forward_pass():
    outputs = [Outputs(None), Outputs(None)]

    def path(number, first, nodes, drafter="cache"):
        rows = PassRows(SimpleNamespace(drafter=drafter), outputs[number], first, None)
        return CommittedPath(rows, np.array(nodes, np.int32))

    paths = [path(0, 0, [0, 2]), path(1, 0, [0]), path(0, 5, [0, 1]), path(0, 9, [0], drafter=None)]
    assert by_outputs(paths) == [[paths[0], paths[2]], [paths[1]]]


@pytest.mark.parametrize("call", ["run", "commit"])
def test_a_call_that_fails_in_its_second_commit_has_changed_no_sequence(tiny_pair, call):
    class Full(Verifier):
        is_full = False

        def commit_one(self, state, outputs, path):
            super().commit_one(state, outputs, path)
            if self.is_full and state is sessions[1].state:
                raise MemoryError("out of memory")

    backend = load(*tiny_pair, LoadConfig())
    backend.verifier = Full(backend.target)
    sessions = [SequenceSession(backend, drafts=True) for _ in range(2)]
    tree, path = DraftTree.chain(np.array([7, 8, 9], np.int32)), np.array([0, 1], np.int32)
    for session in sessions:
        session.extend([5, 6])
    found = backend.verifier.run([Verify(x.state, tree, SamplingParams()) for x in sessions])
    before = [session.state.read_kv_cache() for session in sessions]

    states = [session.state for session in sessions]
    arguments = {
        "run": ([Prefill(state, [4], None) for state in states],),
        "commit": (found, [(state, path) for state in states]),
    }
    backend.verifier.is_full = True
    with pytest.raises(MemoryError):
        getattr(backend.verifier, call)(*arguments[call])
    backend.verifier.is_full = False
    for session, kv_cache in zip(sessions, before, strict=True):
        assert np.array_equal(session.state.read_kv_cache(), kv_cache)
        session.verify(tree)
        session.commit(path)
        assert session.length == 4
        assert sum(len(part) for part in session.state.context) == 4


def test_refusals_name_the_type_and_the_reason():
    assert refusal("mamba") == (
        "mamba models cannot run a draft tree: their recurrent layers decay each channel of the "
        "state separately"
    )
    assert "they are square" in refusal("new", "they are square")
    assert "of an unknown kind" in refusal("new")
