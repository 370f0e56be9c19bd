"""Loading a drafter and its head: their tensors, packed for the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from treeflash.config import LoadConfig
from treeflash.decoding.backend_base import UNQUANTISED_BITS
from treeflash.drafters.config import DrafterShape
from treeflash.drafters.folder import StoredTensor, read_quantised
from treeflash.drafters.loading import read_layout
from treeflash.drafters.mtp_heads import refuse_missing_targets, refuse_window
from treeflash_cuda.drafter import OutputStage
from treeflash_cuda.drafter_model import DrafterModel, OnDevice, filled, load_model
from treeflash_cuda.heads import HEAD_CLASSES, TABLE_HEADS, TableHead
from treeflash_cuda.linear import NATIVE, pack_linears, quantising, rounding
from treeflash_cuda.low_bit_linear import LowBitLinear
from treeflash_cuda.mtp_head import MtpHead, MtpModel
from treeflash_cuda.operations import PYTORCH, Operations, Shapes
from treeflash_cuda.target import Target
from treeflash_cuda.target_loading import load_kernels

CPU_DRAFT_BITS = 8
"""Bits of a drafter's weights beside a target with weights of few bits on a CPU."""
Model: TypeAlias = DrafterModel | MtpModel
Head: TypeAlias = TableHead | MtpHead


def load_drafter(folder: Path, target: Target, config: LoadConfig) -> tuple[Model, Head | None]:
    """Load a drafter, packed for the device; the target keeps the outputs that it reads."""
    model, head = read_drafter(folder, target)
    captured = {*model.config.target_layer_ids}
    if isinstance(model, MtpModel):
        refuse_window(config)
        if target.tower is not None:
            captured.add(-1)  # embeddings that have features of images; see `Verifier.forward`
    target.capture(sorted(captured))
    bits = choose_bits(config.draft_bits, target)
    model.operations = load_drafter_operations(model.config, target, bits)
    pack_drafter(model, head, target, bits)
    return model, head


def read_drafter(folder: Path, target: Target) -> tuple[Model, Head | None]:
    """Read a drafter that belongs to a target, as modules of PyTorch that training has, too."""
    vocab_size, hidden_size = target.embeddings.shape
    layout = read_layout(
        folder,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_hidden_layers=len(target.layers),
    )
    refuse_missing_targets(layout.config, "cuda")
    tensors = layout.read(read_tensors, dequantise, torch.stack)
    config = tensors.config
    if layout.format.kind == "rows":
        rows = load_model(MtpModel, tensors, target)
        return rows, None if config.has_marginals else MtpHead(rows, OutputStage(rows, target))
    model = load_model(DrafterModel, tensors, target)
    if config.head is None:
        return model, None
    make = partial(HEAD_CLASSES[config.head], config, tensors.head_size, target.vocab_size)
    module: Any = filled(make, tensors.head, target)
    return model, TABLE_HEADS[module.kind](module, OutputStage(model, target))


def read_tensors(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def dequantise(path: Path, weights: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x) for name, x in read_quantised(path, weights).items()}


def choose_bits(asked: int | None, target: Target) -> int | None:
    """Return the bits that a drafter's weights are rounded to; None keeps them as they are.

    By default they are rounded where a target's weights have few bits on a CPU: reading the
    drafter's weights would take as long as reading the target's.
    """
    if asked is not None:
        return None if asked == UNQUANTISED_BITS else asked
    keeps_bits = any(isinstance(layer, LowBitLinear) for layer in target.model.modules())
    return CPU_DRAFT_BITS if keeps_bits else None


def pack_drafter(model: Model, head: Head | None, target: Target, bits: int | None) -> None:
    """Pack a drafter, with weights rounded to numbers of `bits` bits if given.

    Then a copy of its output head is rounded, too, unless it is a target's with few bits. Logits of
    some tokens alone, as of a shortlist, are computed from the original output head.
    """
    for part in model.modules():
        if isinstance(part, OnDevice):
            part.operations = model.operations
    modules: set[Any] = {model, getattr(head, "module", model)}
    packings, on_cpu = [NATIVE], target.device.type == "cpu"
    if bits is not None:
        product = (model.operations or PYTORCH).quantised_linear
        rounded = rounding(bits) if on_cpu else quantising(bits, product)
        packings.insert(0, rounded)
        weight: Any = model.own.lm_head
        bias = None
        if weight is None:
            weight, bias = target.lm_head_weight, getattr(target.lm_head, "bias", None)
        if isinstance(weight, Tensor) and rounded.fits(weight):
            model.own.quantised_lm_head = rounded.pack(weight, bias)
    for module in modules:
        pack_linears(module, packings)
    if on_cpu and find_spec("llvmlite") is not None:
        from treeflash_cuda.cpu.drafter_calls import compile_drafter

        compile_drafter(modules, target)


def load_drafter_operations(
    config: DrafterShape, target: Target, bits: int | None = None
) -> Operations | None:
    """Load the drafter's operations: the target's, unless it has other shapes."""
    shapes = Shapes(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        sinks=getattr(config, "attention_sinks", False),
        experts=getattr(config, "experts", None) is not None,
        draft_bits=() if bits is None else (bits,),
    )
    own = target.operations
    if target.device.type != "cuda" or (own is not None and own.shapes == shapes):
        return own
    return load_kernels(shapes, target.device, target.dtype, "in the drafter ")
