"""Stored states of the number formats in which backends keep keys, values and features."""

import pytest

from treeflash.config import LoadConfig
from treeflash.registry import loader
from treeflash.testing.models import write_pair
from treeflash.testing.states import check_storage

pytestmark = pytest.mark.sample(3)

PACKAGES = {"cuda": "torch", "mlx": "mlx_lm"}
FORMATS = {
    "half precision": ("cuda", {"dtype": "bfloat16", "exact": False}),
    "exact mode": ("cuda", {"dtype": "bfloat16", "exact": True}),
    "exact mode in float16": ("cuda", {"dtype": "float16", "exact": True}),
    "8 bits": ("cuda", {"dtype": "bfloat16", "kv_bits": 8}),
    "half precision on mlx": ("mlx", {"dtype": "bfloat16"}),
    "4 bits on mlx": ("mlx", {"dtype": "bfloat16", "kv_bits": 4}),
}


@pytest.mark.parametrize("read", [0, 11])
@pytest.mark.parametrize("name", FORMATS)
def test_a_stored_state_continues_bit_for_bit(name, read, tmp_path):
    backend, settings = FORMATS[name]
    pytest.importorskip(PACKAGES[backend])
    # Groups of quantised numbers have 32 of them: the width of a head.
    folders = write_pair(tmp_path, "qwen3", hidden_size=64)
    pair = loader(backend)(*folders, LoadConfig(device="cpu", **settings))
    assert (pair.inexact is None) == bool(settings.get("exact"))
    check_storage(pair, read=read)
