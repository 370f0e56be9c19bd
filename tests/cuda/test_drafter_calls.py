"""The layers of a drafter in one call."""

from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

import numpy as np
import pytest
from faulty_kernels import faulty
from recordings import recording

from treeflash.config import LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.testing import require
from treeflash.testing.models import write_pair

require("torch")
require("llvmlite")

import torch
from treeflash_cuda.backend import load
from treeflash_cuda.cpu import drafter_calls
from treeflash_cuda.cpu.drafter_calls import BlockCalls

KINDS = {
    "everything is seen": {},
    "causal": {"causal": (True, False)},
    "windows": {"sliding_windows": (None, 9)},
    "a window inside blocks": {"sliding_windows": (3, None)},
    "a causal window": {"sliding_windows": (3, 9), "causal": (True, True)},
    "a window before the root": {"sliding_windows": (4, None), "window_from_root": True},
}
TOLERANCE = 0.03
"""Share of the largest output: activations are rounded to 8 bits, which turns a difference of
rounding into a larger one."""


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    folders = write_pair(tmp_path_factory.mktemp("pair"), "qwen3", vocab_size=40, hidden_size=128)
    return load(*folders, LoadConfig(device="cpu", dtype="float32", draft_bits=8))


def drafts_of(backend):
    """Outputs of blocks, and keys and values: with new positions, without, and of two sequences."""
    rng = np.random.default_rng(5)
    found = []
    with ExitStack() as stack:
        sessions = [SequenceSession(backend, drafts=True) for _ in range(2)]
        for session, length in zip(sessions, (17, 2), strict=True):
            stack.enter_context(closing(session.state))
            session.extend(rng.integers(0, 39, length).tolist())
        first, second = (session.state for session in sessions)
        for batch in ([(first, 3)], [(first, 4)], [(second, 5), (first, 6)], [(second, 7)]):
            found += [block.slots for block in backend.drafter.draft(batch)]
            sessions[0].extend(rng.integers(0, 39, 3).tolist())
        found += [torch.from_numpy(state.drafter.read()) for state in (first, second)]
    return found


@contextmanager
def drafting(backend, kind, calls=lambda model, dtype: None):
    """Let layers of a kind run as these calls; without them as modules."""
    model = backend.drafter_model
    before = model.config, model.calls
    model.config = replace(model.config, **KINDS[kind])
    model.calls = calls(model, torch.float32)
    try:
        yield
    finally:
        model.config, model.calls = before


def near(actual, expected):
    assert len(actual) == len(expected)
    pairs = zip(actual, expected, strict=True)
    return all((x - y).abs().max() <= TOLERANCE * y.abs().max() for x, y in pairs)


@pytest.fixture(scope="module")
def expected(backend):
    """What modules give for each kind of layers."""
    found = {}
    for kind in KINDS:
        with drafting(backend, kind):
            found[kind] = drafts_of(backend)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_they_give_what_modules_give(backend, expected, kind):
    with drafting(backend, kind, BlockCalls.of), recording(BlockCalls, "run") as runs:
        assert near(drafts_of(backend), expected[kind])
    assert len(runs) == 4


FAULTS = {
    "none": ("ROPE = 0", "ROPE = 0"),
    "the context's rotation for blocks": ("positions.roll(-len(context))", "positions"),
    "rotation to the other side": ("].neg_()", "].abs_()"),
    "no context": ("of_context=x.layer in of_context", "of_context=False"),
    "queries of the context alone": (
        "= attention.k_proj, attention.v_proj",
        "= (attention.q_proj,)",
    ),
    "the context behind the block": ("(cache, cache.length, start", "(cache, start, start"),
    "slots that see up to themselves": ("slots if is_causal else lasts", "slots"),
    "slots that see all slots": ("slots if is_causal else lasts", "lasts"),
    "a window that is too wide": ("slots - window + 1", "slots - window"),
    "a window that is too narrow behind": ("np.minimum(slots + window - 1", "np.minimum(slots"),
    "a window from each slot": ("firsts = roots - window", "firsts = slots - window"),
    "no residual": ("return y + residual", "return y"),
    "norms of keys for queries": ("attention.q_norm.weight, ", "attention.k_norm.weight, "),
    "the other norm": ("layer.input_layernorm", "layer.post_attention_layernorm"),
    "factors for gates": (
        "network.gate_proj, network.up_proj",
        "network.up_proj, network.gate_proj",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(tmp_path, backend, expected, fault):
    broken = faulty(drafter_calls, tmp_path, *FAULTS[fault])

    def is_right(kind):
        with drafting(backend, kind, broken.BlockCalls.of):
            return near(drafts_of(backend), expected[kind])

    assert all(map(is_right, KINDS)) == (fault == "none")


def test_modules_run_where_blocks_do_not_see_some_positions(backend, monkeypatch):
    """The last draft's sequence is too short for a gap between its first positions and a window."""
    monkeypatch.setattr(backend.drafter, "window", 4)
    with recording(BlockCalls, "run") as runs:
        drafts_of(backend)
    assert len(runs) == 1


def test_modules_run_in_other_dtypes(backend):
    assert BlockCalls.of(backend.drafter_model, torch.bfloat16) is None
