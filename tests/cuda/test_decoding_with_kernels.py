"""Decoding with the Triton kernels in the interpreter: the reference's trees and tokens."""

import numpy as np
import pytest
from parts import load_with_parts

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.reference.backend import load as load_reference
from treeflash.testing import HYBRID_FAMILIES, require
from treeflash.testing.comparisons import assert_equal_steps, random_tokens, steps_of
from treeflash.testing.models import write_drafter, write_target
from treeflash.testing.pairs import SAMPLINGS

require("torch")
require("triton")

import triton_interpreter  # noqa: F401 - repairs it
from treeflash_cuda.gpu.triton_kernels import attention, convolution, layers, moves, recurrence
from treeflash_cuda.operations import Operations, sample_rows

pytestmark = pytest.mark.sample(1)

VOCAB = 24


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("sampling", ["greedy", "all"])
@pytest.mark.parametrize("method", ["treeflash", "ar"])
@pytest.mark.parametrize("family", ["mistral", "qwen3", *HYBRID_FAMILIES])
def test_trees_and_tokens_equal_the_references(family, method, sampling, tmp_path, monkeypatch):
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    # Few layers, because the interpreter takes a second for a prompt's layer.
    write_target(target, family, seed=1, vocab_size=VOCAB, layers=2)
    window = 4 if family == "mistral" else None
    write_drafter(drafter, target, seed=2, layers=1, target_layer_ids=(0, 1), sliding_window=window)
    backend = load_with_parts(monkeypatch, target, drafter)
    counted = Counted(attention.tree_attention), Counted(layers.rotate_and_store)
    recurrences = Counted(recurrence.tree_recurrence), Counted(recurrence.commit_recurrence)
    recurrences += (Counted(convolution.convolve_paths),)
    samplings = Counted(sample_rows)
    backend.target.operations = Operations(
        *(counted[0], layers.rms_norm, counted[1], layers.gated),
        tree_recurrence=recurrences[0],
        commit_recurrence=recurrences[1],
        convolve_paths=recurrences[2],
        move_columns=moves.move_columns,
        sample_rows=samplings,
    )
    reference = load_reference(target, drafter, LoadConfig())
    monkeypatch.setattr(attention, "MAX_TILE", 16)
    length, tokens = 15, 3  # together more than a tile
    if family in HYBRID_FAMILIES:  # the interpreter takes seconds for every step
        length, tokens = 5, 3
    prompt = random_tokens(np.random.default_rng(3), VOCAB, length)
    config = DecodeConfig(method=method, budget=6, max_tokens=tokens, sampling=SAMPLINGS[sampling])
    found, expected = (steps_of(x, prompt, config) for x in (backend, reference))
    assert_equal_steps(found, expected)
    assert counted[0].calls > 0
    assert counted[1].calls > 0
    assert sampling == "greedy" or samplings.calls > 0
    assert all((x.calls > 0) == (family in HYBRID_FAMILIES) for x in recurrences)
