"""PyTorch's definitions of operations, numbers in 8 bits, and attention with its masks and layouts.

Also kernels for prompts on a GPU, parts of drafters' heads, and linear layers laid out for a CPU.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cuda import use_cuda_strides
from parts import use_models
from stand_ins import stand_in

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.drafters.heads.operations import Slots
from treeflash.testing import require
from treeflash.testing.comparisons import steps_of
from treeflash.testing.models import write_dialect, write_target

require("torch")

import torch
import torch.nn.functional as F
from attention_cases import CASES, attention_case, expected_attention
from torch import nn
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)
from treeflash_cuda.attention import group_mask, grouped_attention
from treeflash_cuda.backend import load
from treeflash_cuda.cache import dequantise, quantise
from treeflash_cuda.drafter_loading import pack_drafter
from treeflash_cuda.drafter_model import Experts
from treeflash_cuda.gpu import prompt_attention
from treeflash_cuda.gpu.kernel_loading import load_operations
from treeflash_cuda.gpu.prompt_attention import causal_attention, seen_floats
from treeflash_cuda.hf.attention_contexts import is_window
from treeflash_cuda.linear import (
    PackedLinear,
    PairLinear,
    PlainLinear,
    can_pack,
    join,
    pack_linears,
    weights_by_format,
)
from treeflash_cuda.numerics import largest, topk, upload, upload_all
from treeflash_cuda.operations import Operations, Shapes, gated, tree_attention
from treeflash_cuda.visible_keys import CHUNK, MIN_PLACES, PLACES_EACH, padded_items, plan_work


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_is_the_softmax_over_the_keys_of_each_row(case):
    inputs = attention_case(case)
    found = tree_attention(**inputs)
    torch.testing.assert_close(found, expected_attention(case, inputs), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(
    ("name", "function"), [("silu", nn.SiLU()), ("gelu_pytorch_tanh", nn.GELU(approximate="tanh"))]
)
def test_gates(name, function):
    gate, up = torch.randn(2, 3, 5)
    assert torch.equal(gated(gate, up, name), function(gate) * up)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_sums_over_chunks_have_separate_places(block):
    """However many rows a block has, and beyond what graphs have by default."""
    sizes, shared = np.array([1, 40, 3, 7, 300]), np.array([5000, 512, 1, 513, 9000])
    items, places = plan_work(sizes.cumsum() - sizes, sizes, shared, block)
    chunks = np.repeat(-(-shared // CHUNK), sizes)
    taken = [place + c for place, n in zip(places, chunks, strict=True) for c in range(n)]
    padded, count = padded_items(items)
    assert count == len(items)
    assert sorted(taken) == list(range(chunks.sum()))
    assert MIN_PLACES < chunks.sum() <= PLACES_EACH * len(padded)
    rows = [(row, chunk) for first, end, chunk in items.tolist() for row in range(first, end)]
    assert sorted(rows) == [(row, c) for row, n in enumerate(chunks.tolist()) for c in range(n)]


def test_operations_without_triton_have_one_line(monkeypatch):
    """PyTorch for Windows has none; only what the model uses is named."""
    monkeypatch.setitem(sys.modules, "treeflash_cuda.gpu.triton_kernels", None)
    shapes = Shapes(heads=4, kv_heads=2, head_dim=8, hidden_size=32)
    operations = load_operations(shapes, torch.device("cpu"), torch.float32)
    assert operations == Operations(reasons=operations.reasons, shapes=shapes)
    (line,) = operations.fallbacks
    assert line.startswith(
        "tree_attention, rms_norm, rotate_and_store, gated, sample_rows, move_columns, "
        "draft_noise, noisy_log_probs run in PyTorch: import of treeflash_cuda.gpu.triton_kernels"
    )
    assert not operations.runs_trees


@pytest.mark.parametrize("size", [40, 1000, 49_152, 50_257])
@pytest.mark.parametrize("k", [1, 16, 64, 1000])
def test_topk(size, k):
    # Few different values: many are equal.
    x = torch.randint(-300, 300, (5, size), generator=torch.Generator().manual_seed(size)) / 7
    values, places = topk(x, k)
    assert torch.equal(values, x.topk(min(k, size)).values)
    assert torch.equal(x.gather(1, places), values)
    assert all(len(row.unique()) == len(row) for row in places)


@pytest.mark.parametrize("k", [1, 64, 1000])
def test_largest(k):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(k))
    rows = torch.stack([x, -x])
    assert torch.equal(largest(rows, k), rows.topk(k).indices.sort().values)


@pytest.mark.parametrize("k", [1, 64])
def test_largest_counts_nan_as_largest(k):
    x = torch.randn(1, 1000, generator=torch.Generator().manual_seed(k))
    x[0, [5, 700]] = torch.nan
    (found,) = largest(x, k)
    assert len(found) == k
    assert {5, 700} & set(found.tolist())
    assert largest(torch.full((1, 1000), torch.nan), k).shape == (1, k)


def test_arrays_of_any_shape_are_uploaded_together():
    arrays = [np.arange(3), np.ones((2, 2), np.bool_), np.zeros((0, 4), np.int64), np.array([-1])]
    found = upload_all(arrays, torch.device("cpu"))
    for part, array in zip(found, arrays, strict=True):
        assert part.dtype == torch.int32
        np.testing.assert_array_equal(part.numpy(), array.astype(np.int32), strict=True)
    assert upload_all([], torch.device("cpu")) == []


def test_uploads_that_are_under_way_are_not_overwritten(monkeypatch):
    """The host goes on while copies from pinned memory wait for their turn."""
    queue = []

    def copy_later(tensor, device, non_blocking=False):
        queue.append((torch.empty_like(tensor), tensor if non_blocking else tensor.clone()))
        return queue[-1][0]

    stand_in(monkeypatch, torch.Tensor, pin_memory=lambda tensor: tensor.clone(), to=copy_later)
    arrays = [np.full(6, n, np.int32) for n in range(200)]
    uploaded = [upload(array, torch.device("cuda")) for array in arrays]
    for target, source in queue:
        target.copy_(source)
    np.testing.assert_array_equal([x.numpy() for x in uploaded], arrays)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_by_half_a_step(dtype):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0], x[0, 1] = 0, 1000 * x[0, 1]
    stored = quantise(x)
    assert (stored.dtype, stored.shape) == (torch.int8, (3, 5, 20))
    y = dequantise(stored, dtype)
    assert y.dtype == dtype
    step = x.abs().amax(-1, keepdim=True).float() / 127
    # The scale and the product are rounded to the dtype.
    bound = step / 2 + 2 * torch.finfo(dtype).eps * x.abs().amax(-1, keepdim=True).float()
    assert ((x.float() - y.float()).abs() <= bound).all()
    assert (y[0, 0] == 0).all()


def test_what_is_not_a_number_stays_so():
    x = torch.ones(2, 8)
    x[0, 3] = torch.nan
    y = dequantise(quantise(x), torch.float32)
    assert y[0].isnan().all()
    assert (y[1] == 1).all()


@torch.inference_mode()
def test_the_state_of_domino_is_that_of_a_gru(tmp_path):
    """One step at a time, of three paths at once; the head leaves the first depth alone."""
    write_target(tmp_path / "target", "qwen3", seed=1)
    write_dialect(tmp_path / "drafter", tmp_path / "target", "specforge-domino", seed=2)
    settings = LoadConfig(device="cpu", dtype="float32")
    domino = load(tmp_path / "target", tmp_path / "drafter", settings)
    config, cell = domino.drafter_config, domino.head.module
    gru = nn.GRU(config.hidden_size, config.head_state_size, bias=False, batch_first=True)
    gru.load_state_dict(cell.prefix_gru.state_dict())
    tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [3, 1, 4, 2]])
    expected, _ = gru(domino.head.output.embed(tokens))
    state = torch.zeros(3, config.head_state_size)
    hidden = torch.zeros(4, config.hidden_size)
    slots = Slots(domino.head.output, hidden, hidden)
    for step in range(4):
        state, queries = cell.step(slots, state, tokens[:, step], step)
        torch.testing.assert_close(state, expected[:, step])
        assert bool(queries.any()) == (step + 1 >= config.head_from_depth)


@torch.inference_mode()
def test_experts_of_heads_compute_what_a_loop_over_experts_does():
    """One expert of five has no rows."""
    torch.manual_seed(0)
    experts = Experts(size=12, width=8, count=5)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    chosen = torch.tensor([[0, 3], [3, 4], [1, 0], [3, 1]])
    x, weights = torch.randn(4, 12), torch.rand(4, 2)
    expected = experts(x, chosen, weights)
    layer = nn.ModuleList([experts])
    layer.operations = Operations()  # as a drafter has them on a GPU
    pack_drafter(
        layer, None, SimpleNamespace(dtype=torch.float32, device=experts.gate_proj.device), None
    )
    assert experts.operations is layer.operations
    torch.testing.assert_close(experts(x, chosen, weights), expected)


def test_grouped_attention_is_attention_with_repeated_keys():
    random = torch.Generator().manual_seed(1)
    q = torch.randn(2, 6, 3, 8, generator=random)
    k, v = torch.randn(2, 2, 2, 10, 8, generator=random)
    mask = torch.randn(1, 1, 3, 10, generator=random)
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=mask, scale=0.3
    )
    actual = grouped_attention(q, [(k, v)], [group_mask(mask, 3)], [3], 0.3)
    torch.testing.assert_close(actual, expected.transpose(1, 2))
    assert actual.is_contiguous()


@pytest.mark.parametrize("m", [8, 9])
def test_rows_of_a_mask_are_aligned(m):
    assert group_mask(torch.randn(1, 1, 3, m), 2).stride(-2) % 8 == 0


@pytest.mark.parametrize("dialect", ["dflash", "deepspec-gemma4", "specforge-domino"])
def test_texts_do_not_depend_on_the_layout_of_what_kernels_return(tmp_path, monkeypatch, dialect):
    """CUDA's is another one than the CPU's. Other dialects attend like these."""
    use_models(monkeypatch)
    write_target(tmp_path / "target", "qwen3_moe", seed=1)
    write_dialect(tmp_path / "drafter", tmp_path / "target", dialect, seed=2)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    found = []
    for is_transposed in (False, True):
        if is_transposed:
            use_cuda_strides(monkeypatch)
        assert F.scaled_dot_product_attention(q, k, k).is_contiguous() is not is_transposed
        settings = LoadConfig(device="cpu", dtype="float32")
        backend = load(tmp_path / "target", tmp_path / "drafter", settings)
        config = DecodeConfig(method="ddtree", budget=8, max_tokens=12)
        found.append([step.tokens for step in steps_of(backend, [3, 4, 5], config)])
    assert found[0] == found[1]


def test_windows_are_known():
    sliding = sliding_window_causal_mask_function(4)
    assert is_window(sliding, 4)
    assert not is_window(sliding, 5)
    assert not is_window(sliding, 3)
    assert not is_window(sliding, None)
    assert not is_window(causal_mask_function, 4)
    chunked = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    assert not is_window(chunked, 4)


def rounding(q, k, v, window, scale):
    """As fused kernels do: the softmax is rounded to the dtype before the product with values."""
    columns = torch.arange(len(k))
    distance = columns[len(k) - len(q) :, None] - columns
    visible = (distance >= 0) & (distance < (window or len(k)))
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).float() for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), keys) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(q.dtype).float()
    return torch.einsum("hnm,mhd->nhd", weights, values).to(q.dtype)


def one_row_short(q, k, v, window, scale):
    """The last position does not see itself."""
    out = rounding(q, k, v, window, scale)
    return torch.cat([out[:-1], rounding(q[-1:], k[:-1], v[:-1], window, scale)])


def other_scale(q, k, v, window, scale):
    return rounding(q, k, v, window, 1.1 * scale)


def no_window(q, k, v, window, scale):
    return rounding(q, k, v, None, scale)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("rows", [3, 65])
def test_keys_in_8_bits_are_attended_to_as_floats_are(window, rows):
    random = torch.Generator().manual_seed(2)
    q = torch.randn(rows, 4, 8, generator=random)
    stored = quantise(torch.randn(2, 90, 2, 8, generator=random))
    floats = dequantise(stored, torch.float32)
    actual = rounding(q, *seen_floats(q, *stored, window), window, 0.3)
    torch.testing.assert_close(actual, causal_attention(q, *floats, window, 0.3))


@pytest.mark.sample(4)
@pytest.mark.parametrize("attend", [rounding, other_scale, no_window, one_row_short])
@pytest.mark.parametrize("shape", [(8, 2, 128), (9, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_that_round_pass_and_wrong_ones_do_not(attend, shape, dtype):
    heads, kv_heads, head_dim = shape
    shapes = Shapes(heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden_size=32)
    difference = prompt_attention.attention_difference(attend, torch.device("cpu"), dtype, shapes)
    if attend is rounding:
        assert difference < prompt_attention.TOLERANCE / 3
    else:
        assert difference > prompt_attention.TOLERANCE


@pytest.mark.parametrize(
    ("attend", "reason"),
    [(rounding, ""), (no_window, "differ by"), (lambda *_: 1 / 0, "division by zero")],
)
def test_kernels_are_checked_before_they_are_used(monkeypatch, attend, reason):
    difference = prompt_attention.attention_difference
    stand_in(monkeypatch, torch.cuda, get_device_capability=lambda device: (9, 0))
    stand_in(
        monkeypatch,
        prompt_attention,
        flash_attention=attend,
        attention_difference=lambda x, _, *shape: difference(x, torch.device("cpu"), *shape),
    )
    shapes = Shapes(heads=4, kv_heads=2, head_dim=8, hidden_size=32)
    found, why = prompt_attention.load_flash_attention(torch.device("cuda"), torch.bfloat16, shapes)
    assert (found is None) == bool(reason)
    assert reason in why


SHAPES = [(24,), (3, 24), (2, 3, 24), (0, 24), (70, 24)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Attention(nn.Module):
    """Projections by the names that models give them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 40, bias)
        self.k_proj = nn.Linear(24, 8, bias)
        self.v_proj = nn.Linear(24, 16, bias=False)
        self.o_proj = nn.Linear(40, 24, bias)


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return Attention(bias=True)


def close(mine, theirs):
    torch.testing.assert_close(
        mine, theirs, atol=2e-2 if mine.dtype != torch.float32 else 1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_packed_equals_plain(dtype, bias):
    linear = nn.Linear(24, 40, bias).to(dtype)
    module = nn.Sequential(linear)
    pack_linears(module)
    assert isinstance(module[0], PackedLinear) == can_pack(linear.weight)
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        close(module(x), linear(x))
    strided = torch.randn(5, 48).to(dtype)[:, ::2]
    close(module(strided), linear(strided))


@torch.inference_mode()
def test_packed_weights_still_tell_type_and_shape():
    module = nn.Sequential(nn.Linear(24, 40).half())
    pack_linears(module)
    assert (module[0].weight.dtype, module[0].weight.shape) == (torch.float16, (40, 24))
    assert not module[0].weight.requires_grad


def test_other_kinds_of_layers_are_left_alone():
    class Special(nn.Linear):
        pass

    module = nn.Sequential(Special(4, 4), nn.Linear(4, 4).double())
    pack_linears(module)
    assert [type(layer) for layer in module] == [Special, nn.Linear]


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_pair_is_the_layer_of_the_concatenation(bias):
    pair = PairLinear(24, 40, bias)
    own, shared = torch.randn(7, 24), torch.randn(3, 24)
    rows = torch.tensor([0, 1, 1, 1, 2, 2, 0])
    both = torch.cat([own, shared[rows]], -1)
    expected = nn.functional.linear(both, pair.weight, pair.bias)
    close(pair(own, shared, rows), expected)
    close(pair(own[:3], shared, None)[1:2], expected[1:2])
    module = nn.ModuleDict({"pair": pair})
    pack_linears(module)
    close(module["pair"](own, shared, rows), expected)


@pytest.mark.parametrize("make", [PackedLinear, PlainLinear])
@torch.inference_mode()
def test_joined_outputs_equal_separate_ones(attention, make):
    """A plain layer is what a GPU has."""
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    layer = make(*join([x.weight for x in linears], [x.bias for x in linears]))
    x = torch.randn(3, 24)
    for output, linear in zip(layer(x).split([40, 8, 16], -1), linears, strict=True):
        close(output, linear(x))


class Wrapped(torch.Tensor):
    """A weight of other tensors, as torchao has them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float64)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise AssertionError(f"{func} of a weight that is no plain tensor")


def test_weights_of_other_tensors_are_not_packed(attention):
    nbytes = sum(parameter.nbytes for parameter in attention.parameters())
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        layer.weight = nn.Parameter(Wrapped(layer.weight.data), requires_grad=False)
    pack_linears(attention)
    assert {type(child) for child in attention.children()} == {nn.Linear}
    assert weights_by_format([attention]) == {"Linear": nbytes}
