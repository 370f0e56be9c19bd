"""Linear layers laid out for the CPU's kernels give what the plain ones give."""

import pytest

from treeflash.testing import require

require("torch")

import torch
from torch import nn
from treeflash_cuda.linear import (
    PackedLinear,
    PairLinear,
    PlainLinear,
    can_pack,
    join,
    pack_linears,
    weights_by_format,
)

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
