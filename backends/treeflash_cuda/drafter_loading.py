"""Loading a drafter and its head: their tensors, packed for the device."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from treeflash.config import LoadConfig
from treeflash.decoding.backend_base import UNQUANTISED_BITS
from treeflash.drafters.config import DrafterShape
from treeflash.drafters.folder import StoredTensor, open_folder, read_quantised
from treeflash.drafters.loading import Layout, block_tensors, mtp_tensors, read_layout
from treeflash.drafters.mtp_heads import refuse_missing_targets, refuse_window
from treeflash_cuda.cpu.decoder_target import CpuTarget
from treeflash_cuda.cpu.low_bit_loading import rounding
from treeflash_cuda.drafter import OutputStage
from treeflash_cuda.drafter_model import DrafterModel, load_weights
from treeflash_cuda.drafter_operations import OnDevice
from treeflash_cuda.heads import HEAD_CLASSES, TABLE_HEADS, TableHead
from treeflash_cuda.linear import (
    NATIVE,
    Packing,
    QuantisedLinear,
    has_groups,
    pack_linears,
)
from treeflash_cuda.low_bit_linear import LowBitLinear
from treeflash_cuda.mtp_head import MtpHead, MtpModel
from treeflash_cuda.operations import PYTORCH, Operations, Shapes
from treeflash_cuda.target import Target
from treeflash_cuda.target_loading import load_kernels, target_shapes

CPU_DRAFT_BITS = 8
"""Bits of a drafter's weights beside a target with weights of few bits on a CPU."""
Model: TypeAlias = DrafterModel | MtpModel
Head: TypeAlias = TableHead | MtpHead


def load_packed_drafter(
    folder: Path, target: Target, config: LoadConfig
) -> tuple[Model, Head | None]:
    """Load a drafter, packed for the device; the target keeps the outputs that it reads."""
    layout = drafter_layout(folder, target)
    target.capture(layout.config.target_layer_ids)
    bits = choose_draft_bits(config.draft_bits, target)
    operations = load_drafter_operations(layout.config, target, bits)
    model: Model
    head: Head | None
    if layout.format.kind == "rows":
        refuse_window(config)
        model = load_mtp_head(layout, target)
        head = None if model.config.has_marginals else MtpHead(model, OutputStage(model, target))
    else:
        model, head = load_drafter(layout, target)
    model.operations = operations
    pack_drafter(model, head, target, bits)
    return model, head


def choose_draft_bits(asked: int | None, target: Target) -> int | None:
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
    modules: set[Any] = {model, getattr(head, "module", model)}
    packing, on_cpu = NATIVE, target.device.type == "cpu"
    if bits is not None:
        product = (model.operations or PYTORCH).quantised_linear
        on_gpu = Packing(functools.partial(QuantisedLinear, product, bits), has_groups)
        packing = rounding(bits) if on_cpu else on_gpu
        weight: Any = model.own.lm_head
        bias = None
        if weight is None:
            weight, bias = target.lm_head_weight, getattr(target.lm_head, "bias", None)
        if isinstance(weight, Tensor) and packing.fits(weight):
            model.own.quantised_lm_head = packing.pack(weight, bias)
    for module in modules:
        pack_linears(module, packing)
        pack_linears(module)  # layers that cannot be rounded
        if isinstance(target, CpuTarget) and target.kernels is not None:
            from treeflash_cuda.cpu.drafter_norms import use_kernels  # needs llvmlite

            use_kernels(module, target.kernels, target.dtype)
    if isinstance(model, DrafterModel) and on_cpu and find_spec("llvmlite") is not None:
        from treeflash_cuda.cpu.drafter_calls import BlockCalls  # needs llvmlite

        model.calls = BlockCalls.of(model, target.dtype)
    for part in model.modules():
        if isinstance(part, OnDevice):
            part.operations = model.operations


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
    if target.device.type != "cuda" or shapes == target_shapes(target):
        return target.operations
    return load_kernels(shapes, target.device, target.dtype, "in the drafter ")


def drafter_layout(folder: Path, target: Target) -> Layout:
    """Check that the drafter of a folder belongs to the target, before its weights are read."""
    vocab_size, hidden_size = target.embeddings.shape
    return read_layout(
        open_folder(folder),
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_hidden_layers=len(target.layers),
    )


def load_mtp_head(layout: Layout, target: Target) -> MtpModel:
    """Read a head that drafts depth by depth."""
    refuse_missing_targets(layout.config, "cuda")
    tensors = mtp_tensors(layout, read_tensors, dequantise, torch.stack)
    return load_weights(MtpModel, layout.config, *tensors, target)


def read_tensors(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def dequantise(path: Path, weights: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x) for name, x in read_quantised(path, weights).items()}


def load_drafter(layout: Layout, target: Target) -> tuple[DrafterModel, TableHead | None]:
    """Read a block drafter."""
    tensors = block_tensors(layout, read_tensors, dequantise)
    config = tensors.config
    model = load_weights(DrafterModel, config, tensors.backbone, tensors.vocabulary, target)
    if config.head is None:
        return model, None
    with torch.device("meta"):
        module: Any = HEAD_CLASSES[config.head](config, tensors.head_size, target.vocab_size)
    module.load_state_dict(tensors.head, assign=True)
    module = module.to(target.device, target.dtype).eval()
    return model, TABLE_HEADS[module.kind](module, OutputStage(model, target))
