"""Distillation on MLX."""

import pytest
from distilled import check_plain_decoding

from treeflash.testing import require

require("mlx")

pytestmark = pytest.mark.sample(1)


@pytest.mark.parametrize("parallel", [1, 3])
def test_responses_are_those_of_plain_decoding(parallel, tmp_path):
    check_plain_decoding("mlx", "qwen3", tmp_path, "--parallel", str(parallel))
