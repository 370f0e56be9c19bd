"""The same weights of hybrid targets in PyTorch and in MLX: identical trees, paths and tokens.

Lightning attention is not among them: transformers has it in MiniMax-01 alone, which the PyTorch
backend refuses, and mlx-lm lacks that type.
"""

import pytest

from treeflash.config import METHODS
from treeflash.testing import HYBRID_FAMILIES, require, write_drafter, write_target
from treeflash.testing.pairs import DRAFTER_SEED, SAMPLINGS, TARGET_SEED

require("torch")
require("mlx_lm")

from both_backends import assert_equal_iterations, load_both
from families import cuda as families

# In every run each backend equals the reference in its own suite, and so the other one; the tests
# of hybrid targets compare other types with transformers and mlx-lm.
pytestmark = pytest.mark.nightly

VOCAB_SIZE = 24
TYPES = "falcon_h1", "qwen3_next", "mamba2", "lfm2"
"""Mamba-2 beside attention in a layer and alone, gated delta nets, and short convolutions."""
# mlx-lm normalises several groups together, which is another model.
ONE_GROUP = {"mamba2": {"n_groups": 1}, "falcon_h1": {"mamba_n_groups": 1}}


@pytest.fixture(scope="module", params=[*TYPES, *HYBRID_FAMILIES, "olmo_hybrid", "lfm2_moe"])
def backends(request, tmp_path_factory):
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    target, drafter = folder / "target", folder / "drafter"
    if name in HYBRID_FAMILIES:
        write_target(target, name, seed=TARGET_SEED, vocab_size=VOCAB_SIZE)
    else:
        families.write(target, name, vocab_size=VOCAB_SIZE, **ONE_GROUP.get(name, {}))
    write_drafter(drafter, target, seed=DRAFTER_SEED)
    return load_both(target, drafter)


@pytest.mark.parametrize("sampling", ["all", "greedy"])
@pytest.mark.parametrize("method", ["treeflash", *(x for x in METHODS if x != "treeflash")])
def test_iterations_are_identical(backends, method, sampling):
    assert_equal_iterations(backends, method, SAMPLINGS[sampling], VOCAB_SIZE)
