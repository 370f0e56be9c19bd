"""The MLX backend, on its default device and in float32."""

import pytest

from treeflash.testing import DIALECTS, HYBRID_FAMILIES, BackendSuite, require

require("mlx_lm")

from treeflash_mlx.backend import load as load_mlx


class TestConformance(BackendSuite):
    dialects = tuple(DIALECTS)
    hybrids = HYBRID_FAMILIES

    @pytest.fixture
    def load(self):
        return load_mlx
