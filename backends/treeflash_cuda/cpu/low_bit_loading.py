"""Which weights of few bits a CPU keeps.

Folders with packed weights are written by `treeflash.hub.gguf_weights`. `decoder.weights` reads
them for layers of our own, and `hf.low_bit_models` for models of transformers. Nothing is copied:
processes that load the same folder share the memory, and weights are read when a pass first needs
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from treeflash.config import LoadConfig
from treeflash.low_bit_formats import MLX, find_format
from treeflash.low_bits import METHOD
from treeflash_cuda.decoder.facts import decoder_facts
from treeflash_cuda.decoder.plain_config import target_config
from treeflash_cuda.decoder.weights import Checkpoint
from treeflash_cuda.target import skeleton

UNPACKED_BITS = 16
"""The number of `LoadConfig.bits` with which weights of few bits are dequantised."""


def is_packed(config: Any) -> bool:
    """Return whether a folder with this configuration has packed weights."""
    settings = getattr(config, "quantization_config", None)
    return isinstance(settings, Mapping) and settings.get("quant_method") == METHOD


def keeps_bits(folder: Path, on_cpu: bool) -> bool:
    """Return whether weights of a folder may keep the few bits that they have.

    Folders with packed weights are also loaded elsewhere, where they are dequantised. Others keep
    their bits in layers of our own, and in models of transformers whose layers have their names;
    MLX changes names and weights of some models.
    """
    config = target_config(folder)
    if is_packed(config) or not on_cpu or not isinstance(find_format(config.to_dict()), tuple):
        return is_packed(config)
    checkpoint = Checkpoint(folder, config.to_dict())
    stored = checkpoint.low_bits
    if stored is None or not stored.layers or checkpoint.foreign is not None:
        return False
    if not isinstance(decoder_facts(config), str):
        return True
    if stored.format.name == MLX or config.get_text_config() is not config:
        return False
    model = skeleton(config)
    modules = {} if model is None else dict(model.named_modules())
    return all(isinstance(modules.get(name), nn.Linear) for name in stored.layers)


def bits_refusal(config: LoadConfig, *, on_cpu: bool, processes: int = 1) -> str | None:
    """Return why a target's weights cannot keep few bits with these settings; None if they can.

    It is empty if the settings ask for what excludes them. Activations of 8 bits turn differences
    of rounding into larger ones, so that only exact mode keeps the texts of plain decoding.
    """
    excluded = config.kv_bits, config.compile, config.device_map, config.adapter, processes > 1
    is_wide = config.dtype == "float32" and not config.exact
    if not on_cpu or config.bits == UNPACKED_BITS or config.exact is False or is_wide:
        return ""
    return "" if any(excluded) else products_refusal()


def products_refusal() -> str | None:
    """Return why this machine cannot multiply weights of few bits; None if it can."""
    if find_spec("llvmlite") is None:
        return "llvmlite is not installed (pip install llvmlite)"
    from treeflash_cuda.cpu.machine_code import best_isa

    return None if best_isa() else "this processor has no instructions for products of bytes"
