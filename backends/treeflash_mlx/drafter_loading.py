"""Loading a drafter and its head: their tensors, quantised where that is asked for."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import mlx.core as mx
from mlx import nn

from treeflash.decoding.backend_base import UNQUANTISED_BITS
from treeflash.decoding.mtp_head import MtpHead
from treeflash.drafters.folder import StoredTensor
from treeflash.drafters.formats import HEADS
from treeflash.drafters.loading import Layout, arrange_block, read_layout
from treeflash_mlx.assistant import AssistantHead, AssistantModel, AssistantOutput
from treeflash_mlx.drafter import OutputStage
from treeflash_mlx.drafter_model import (
    DrafterModel,
    Float32Bias,
    Float32Norm,
    OwnVocabulary,
    as_module,
    split_pairs,
)
from treeflash_mlx.heads import TABLE_HEADS, TableHead
from treeflash_mlx.mtp_head import MtpModel
from treeflash_mlx.target import Target

Model: TypeAlias = DrafterModel | MtpModel | AssistantModel
Head: TypeAlias = TableHead | MtpHead

BITS = (2, 3, 4, 5, 6, 8)
LEAST_DEFAULT_BITS = 4
"""Drafters take no fewer bits unless asked to: what they lose with fewer was never measured."""
GROUP_SIZE = 64
PARTS = "weight", "scales", "biases"
"""The tensors of a quantised weight."""


def load_drafter(folder: Path, target: Target, bits: int | None) -> tuple[Model, Head | None]:
    """Load a drafter that belongs to a target, and quantise it to `bits` if given.

    The target keeps the outputs that the drafter reads.
    """
    target.check_drafting()
    layout = read_layout(
        folder,
        hidden_size=target.embed(mx.array([0])).shape[-1],
        vocab_size=target.vocab_size,
        num_hidden_layers=len(target.layers),
    )
    tensors = layout.read(read_tensors, dequantise, mx.stack)
    config, own, most = tensors.config, OwnVocabulary(tensors.vocabulary, target), bits or 0
    if layout.format.kind == "rows":
        # Heads that read embeddings take an image's features from the first layer's input.
        target.capture((*config.target_layer_ids, -1))
        if config.assistant is not None:
            assistant = AssistantModel(config, config.assistant, own, target)
            fill(assistant, tensors.backbone, target.dtype, bits)
            return assistant, AssistantHead(assistant, AssistantOutput(assistant, target))
        rows = MtpModel(config, own)
        fill_rows(rows, tensors.backbone, target.dtype, bits, quantised_layers(layout, most))
        return rows, None if config.has_marginals else MtpHead(rows, OutputStage(rows, target))
    target.capture(config.target_layer_ids)
    model, weights = DrafterModel(config, own), tensors.backbone
    if offset := config.norm_offset:  # in float32, where adding it rounds nothing
        norms = {name: x for name, x in weights.items() if name.endswith("norm.weight")}
        weights |= {name: x.astype(mx.float32) + offset for name, x in norms.items()}
    kept = quantised_layers(layout, most, lambda x: arrange_block(layout, x).backbone)
    fill(model, weights, target.dtype, bits, kept)
    if config.head is None:
        return model, None
    head_class = as_module(HEADS[config.head].module)
    module: Any = head_class(config, tensors.head_size, target.vocab_size)
    kept = quantised_layers(layout, most, lambda x: arrange_block(layout, x).head)
    fill(module, split_pairs(module, tensors.head), target.dtype, bits, kept)
    return model, TABLE_HEADS[module.kind](module, OutputStage(model, target))


def choose_bits(asked: int | None, target: nn.Module, *, on_cpu: bool) -> int | None:
    """Return the bits that a drafter is quantised to; None keeps it as it is.

    An iteration on a GPU takes as long as its weights take to be read, so by default a drafter has
    the width of most of the target's weights. On a CPU products of few rows are slower with
    quantised weights.
    """
    if asked is not None:
        return None if asked == UNQUANTISED_BITS else asked
    numbers: Counter[int] = Counter()
    for module in target.modules():
        if (weight := module.get("weight")) is not None:
            bits = getattr(module, "bits", None)
            numbers[bits or UNQUANTISED_BITS] += 8 * weight.nbytes // bits if bits else weight.size
    [(width, _)] = numbers.most_common(1)
    return None if on_cpu or width not in BITS else max(width, LEAST_DEFAULT_BITS)


def quantised_layers(
    layout: Layout,
    most: int,
    arrange: Callable[[dict[str, mx.array]], dict[str, mx.array]] = dict,
) -> dict[str, dict[str, mx.array]]:
    """Read the layers of a drafter that its file has quantised to at most some bits, by name.

    Each has a weight, scales and biases, in groups of any size. `arrange` gives each of these the
    rows and the name that the model's weight has.
    """
    found: defaultdict[str, dict[str, mx.array]] = defaultdict(dict)
    tensors = layout.folder.tensors
    kept = {x: name for x, name in layout.names.items() if 0 < tensors[x].bits <= most}
    for part in PARTS:
        arrays: dict[str, mx.array] = {}
        for stored, name in kept.items():
            of_part = stored.removesuffix("weight") + part
            arrays[name] = read_tensors(tensors[stored].path, [of_part])[of_part]
        for name, array in arrange(arrays).items():
            found[name.removesuffix(".weight")][part] = array
    return found


def read_tensors(path: Path, names: Collection[str]) -> dict[str, mx.array]:
    tensors: Any = mx.load(str(path), format="safetensors")  # lazily; the type is the format's
    return {name: tensors[name] for name in names}


def dequantise(path: Path, weights: Mapping[str, StoredTensor]) -> dict[str, mx.array]:
    """Read the numbers of quantised weights lazily: layers that stay as they are need none."""
    found = {}
    for name, weight in weights.items():
        names = [name.removesuffix("weight") + part for part in PARTS]
        words, scales, biases = read_tensors(path, names).values()
        group, wide = weight.shape[-1] // scales.shape[-1], mx.float32
        scales, biases = scales.astype(wide), biases.astype(wide)  # gives the numbers this type
        found[name] = mx.dequantize(words, scales, biases, group, weight.bits)
    return found


def fill(
    module: nn.Module,
    tensors: dict[str, mx.array],
    dtype: mx.Dtype,
    bits: int | None,
    quantised: Mapping[str, Mapping[str, mx.array]] = MappingProxyType({}),
) -> None:
    """Load the weights of a module, and quantise the layers that allow it if `bits` is given.

    The layers that are quantised already, by name, keep their weights, scales and biases. Other
    modules, such as a router, have dequantised ones.
    """
    module.load_weights(list(tensors.items()))
    module.set_dtype(dtype)
    if bits is not None:
        layers = {name for name, child in module.named_modules() if hasattr(child, "to_quantized")}

        def fits(name: str, m: nn.Module) -> bool | dict[str, int]:
            if name not in layers:
                return False
            if name in quantised:
                columns, words = m.weight.shape[-1], quantised[name]["weight"].shape[-1]
                groups = quantised[name]["scales"].shape[-1]
                return {"group_size": columns // groups, "bits": 32 * words // columns}
            return bool(m.weight.shape[-1] % GROUP_SIZE == 0)

        nn.quantize(module, GROUP_SIZE, bits, class_predicate=fits)
        modules = dict(module.named_modules())
        for name in layers & quantised.keys():
            for part, array in quantised[name].items():
                modules[name][part] = array if part == "weight" else array.astype(dtype)
    mx.eval(
        [child.parameters() for child in module.modules()]
    )  # `DrafterModel.own` has parameters too


def fill_rows(
    model: MtpModel,
    tensors: Mapping[str, mx.array],
    dtype: mx.Dtype,
    bits: int | None,
    quantised: Mapping[str, Mapping[str, mx.array]],
) -> None:
    """Load the weights of a head that drafts depth by depth, as `fill` does.

    Some of its norms and biases stay float32, where adding the norms' offset rounds nothing.
    """
    weights = {
        f"{name}.weight" if name.startswith("layer.mlp.experts.") else name: weight
        for name, weight in tensors.items()
    }
    fill(model, weights, dtype, bits, quantised)
    exact = {}
    for name, module in model.named_modules():
        if isinstance(module, Float32Norm):
            weight = weights[f"{name}.weight"].astype(mx.float32)
            exact[f"{name}.weight"] = weight + model.config.norm_offset
        elif isinstance(module, Float32Bias):
            exact[f"{name}.bias"] = weights[f"{name}.bias"].astype(mx.float32)
    model.load_weights(list(exact.items()), strict=False)
    mx.eval(exact)
