"""The same weights of hybrid targets in PyTorch and in MLX: identical trees, paths and tokens.

Lightning attention is not among them: transformers has it in MiniMax-01 alone, which the PyTorch
backend refuses, and mlx-lm lacks that type.
"""

import itertools

import pytest

from treeflash.config import METHODS
from treeflash.testing import HYBRID_FAMILIES, require, write_drafter, write_target
from treeflash.testing.pairs import DRAFTER_SEED, SAMPLINGS, TARGET_SEED

require("torch")
require("mlx_lm")

import families
from both_backends import assert_equal_iterations, load_both

VOCAB_SIZE = 24
TYPES = "qwen3_next", "mamba2", "falcon_h1", "lfm2"
"""Gated delta nets, Mamba-2 alone and beside attention in a layer, and short convolutions."""
# mlx-lm normalises several groups together, which is another model.
ONE_GROUP = {"mamba2": {"n_groups": 1}, "falcon_h1": {"mamba_n_groups": 1}}


# Both backends equal the reference on the first ones in their own suites. The others have kinds of
# layers that other types have too.
OTHERS = [
    pytest.param(name, marks=pytest.mark.nightly)
    for name in (*HYBRID_FAMILIES, "olmo_hybrid", "lfm2_moe")
]


@pytest.fixture(scope="module", params=[*OTHERS, *TYPES])
def backends(request, tmp_path_factory):
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    target, drafter = folder / "target", folder / "drafter"
    if name in HYBRID_FAMILIES:
        write_target(target, name, seed=TARGET_SEED, vocab_size=VOCAB_SIZE)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(families.SMALL, "vocab_size", VOCAB_SIZE)
            own = families.OVERRIDES.get(name, {}) | ONE_GROUP.get(name, {})
            patch.setitem(families.OVERRIDES, name, own)
            families.write(target, name)
    write_drafter(drafter, target, seed=DRAFTER_SEED)
    return load_both(target, drafter)


EACH_RUN = [("treeflash", "all"), ("suffix", "greedy")]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("method", "sampling"),
    [
        pytest.param(*case, marks=[] if case in EACH_RUN else [pytest.mark.nightly])
        for case in itertools.product(METHODS, ("greedy", "all"))
    ],
)
def test_iterations_are_identical(backends, method, sampling):
    assert_equal_iterations(backends, method, SAMPLINGS[sampling], VOCAB_SIZE)
