"""The MLX backend, on its default device, in float32 and in exact mode."""

import pytest

from treeflash.testing import DIALECTS, HYBRID_FAMILIES, BackendSuite, require

require("mlx_lm")

import mlx.core as mx
from laws import BACKEND_SAMPLE
from treeflash_mlx.backend import load as load_mlx


@BACKEND_SAMPLE
class TestConformance(BackendSuite):
    dialects = tuple(DIALECTS)
    hybrids = HYBRID_FAMILIES
    exact_dtypes = ("bfloat16", "float32") if mx.default_device().type == mx.cpu else ()

    @pytest.fixture
    def load(self):
        return load_mlx
