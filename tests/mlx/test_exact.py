"""Exact mode of the MLX backend: the check at load, and what it names."""

import pytest

from treeflash.config import LoadConfig
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.models import write_pair

require("mlx_lm")

import mlx.core as mx
from mlx import nn
from treeflash_mlx.backend import load
from treeflash_mlx.exact import check_operations, operations
from treeflash_mlx.target import Target

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.cpu, reason="exact mode is MLX's on a CPU"
)


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    config = LoadConfig(dtype="bfloat16", exact=True)
    return load(*write_pair(folder, "qwen3", vocab_size=96, hidden_size=64), config)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention to 300 keys", (9, 300)),
        ("attention to 300 keys with others between them", (1, 240)),
    ],
)
def test_attention_that_depends_on_others_is_named(backend, monkeypatch, name, shape):
    """As kernels for few rows and for many do, and sums that are split where columns are."""
    attention = mx.fast.scaled_dot_product_attention

    def changed(q, k, v, **options):
        out = attention(q, k, v, **options)
        return out * 1.01 if (q.shape[2], k.shape[2]) == shape else out

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", changed)
    with pytest.raises(UnsupportedModelError) as caught:
        backend.check_exact()
    assert str(caught.value) == (
        "exact mode is not possible for this target: on this device a row's bits depend on the "
        f"rows or keys beside it in {name}"
    )


def test_products_that_depend_on_their_number_of_rows_are_named(backend, monkeypatch):
    """Products of Metal differ so: one row has another kernel than five."""
    call = nn.Linear.__call__
    monkeypatch.setattr(
        nn.Linear, "__call__", lambda self, x: call(self, x) * (1.01 if len(x) == 9 else 1)
    )
    with pytest.raises(UnsupportedModelError, match=r"beside it in products \d+ x \d+, products"):
        backend.check_exact()


@pytest.mark.parametrize(("family", "attends"), [("gpt2", True), ("mamba", False)])
def test_attention_is_checked_whatever_the_number_of_heads_is_called(
    families, tmp_path, family, attends
):
    families.write(tmp_path, family)
    names = [name for name, *_ in operations(Target(tmp_path, mx.float32, None))]
    assert any("attention" in name for name in names) == attends


# The last two have the most layers and operations.
@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "family",
    [
        *(pytest.param(x, marks=pytest.mark.nightly) for x in ("afm7", "iquestloopcoder")),
        "gear",
        "gemma3n",
    ],
)
def test_targets_may_have_fused_products_states_and_shared_keys(families, tmp_path, family):
    families.write(tmp_path, family)
    backend = load(tmp_path, None, LoadConfig(dtype="bfloat16", exact=True))
    assert backend.inexact is None
    assert backend.target.batches


# The check at load of tiny targets calls the same function.
@pytest.mark.nightly
def test_every_operation_of_the_default_target_is_exact(smollm2):
    """The sizes are the target's, with up to as many rows as a chunk of a prompt has."""
    check_operations(Target(smollm2, mx.bfloat16, None))
