"""Modules whose results an operation gives are replaced; others stay."""

import pytest

from treeflash.testing import require

require("torch")

import torch
from torch import nn
from treeflash_cuda.hf.fused_layers import fuse_layers
from treeflash_cuda.operations import Operations


class Norm(nn.Module):
    """An RMS norm as transformers has it."""

    def __init__(self, added):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))
        self.variance_epsilon = 1e-6
        self.added = added

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return ((self.added + self.weight) * normed).to(x.dtype)


class Gated(nn.Module):
    """A feed-forward network as transformers has it."""

    def __init__(self, activation):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(16, 32, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(32, 16, bias=False)
        self.act_fn = activation

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    ("make", "replaced"),
    [
        (lambda: Norm(0), True),
        (lambda: Norm(1), True),  # Gemma's
        (lambda: Norm(2), False),
        (lambda: Gated(nn.SiLU()), True),
        (lambda: Gated(nn.GELU("tanh")), True),  # Gemma's
        (lambda: Gated(nn.GELU()), False),
        (lambda: Gated(nn.ReLU()), False),
    ],
)
@torch.inference_mode()
def test_modules_that_an_operation_computes_are_replaced(make, replaced):
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, 3, 16)
    expected = module(x)
    fuse_layers(module, Operations(), torch.float32)
    assert ("forward" in vars(module)) == replaced
    torch.testing.assert_close(module(x), expected)


@torch.inference_mode()
def test_hooks_do_not_count():
    """The last layers of a target on several devices have one that moves their outputs."""
    module = Norm(0)
    module.register_forward_hook(lambda _, __, output: output.to("meta"))
    fuse_layers(module, Operations(), torch.float32)
    assert "forward" in vars(module)
    assert module(torch.randn(2, 16)).device.type == "meta"


class Float8Linear(nn.Module):
    """A linear layer with weights of 8 bits, as checkpoints in FP8 have them."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        if x.dtype == self.weight.dtype:
            raise NotImplementedError("activations of 8 bits")
        return x @ self.weight.to(x.dtype).T


@torch.inference_mode()
def test_gated_networks_of_8_bits_are_replaced():
    """The inputs of the trial have the dtype of the layers' outputs, not of their weights."""
    torch.manual_seed(0)
    module, x = Gated(nn.SiLU()).bfloat16(), torch.randn(2, 3, 16).bfloat16()
    for name, linear in list(module.named_children()):
        if isinstance(linear, nn.Linear):
            setattr(module, name, Float8Linear(linear))
    expected = module(x)
    fuse_layers(module, Operations(), torch.bfloat16)
    assert "forward" in vars(module)
    torch.testing.assert_close(module(x), expected)


@torch.inference_mode()
def test_a_module_that_cannot_run_alone_is_left_as_it_is():
    module = Gated(nn.SiLU())
    module.down_proj.forward = lambda x: x.missing  # only inside its model
    fuse_layers(module, Operations(), torch.float32)
    assert "forward" not in vars(module)


def test_a_network_with_weights_in_bytes_is_not_tried():
    """They hold two numbers each, so that they do not tell the width of the input."""
    module = Gated(nn.SiLU())
    stored = torch.zeros(16 * 32 // 2, 1, dtype=torch.uint8)
    module.gate_proj.weight = nn.Parameter(stored, requires_grad=False)
    module.gate_proj.forward = pytest.fail
    fuse_layers(module, Operations(), torch.float32)
    assert "forward" not in vars(module)


@torch.inference_mode()
def test_a_module_that_changes_the_dtype_is_left_as_it_is():
    module = Norm(0)
    plain = module.forward
    module.forward = forward = lambda x: plain(x).double()
    fuse_layers(module, Operations(), torch.float32)
    assert module.forward is forward
