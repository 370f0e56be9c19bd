"""LoRA adapters of targets, in the formats of PEFT and mlx-lm (Hu et al., arXiv 2106.09685).

An adapter adds `scale * up @ down` to the weight W (out, in) of some linear layers. Backends merge
it when they load a target, so that decoding costs nothing more and a drafter of the base model
still drafts. Anything else that an adapter may contain is refused by name, because it would
silently change the model: DoRA, embeddings, biases, whole modules, experts.

| | PEFT | mlx-lm |
| --- | --- | --- |
| weights | `adapter_model.safetensors` | `adapters.safetensors` |
| down (r, in) | `base_model.model.NAME.lora_A.weight` | `NAME.lora_a`, transposed |
| up (out, r) | `base_model.model.NAME.lora_B.weight` | `NAME.lora_b`, transposed |
| scale | `lora_alpha / r`, with rsLoRA `lora_alpha / sqrt(r)` | `lora_parameters.scale` |
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.drafters.folder import read_config, read_file
from treeflash.errors import CheckpointError, UnsupportedModelError

CONFIG = "adapter_config.json"
PEFT_WEIGHTS, MLX_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"
PEFT_PREFIX = "base_model.model."
REFUSED = (
    *("use_dora", "lora_bias", "target_parameters", "modules_to_save", "fan_in_fan_out"),
    "alora_invocation_tokens",
)
"""Settings of PEFT that change more than the weights of linear layers, or only those of a part of
the text."""
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base model's weights."""
SHARED_WEIGHT = "it shares its weight with the embeddings"
"""Why an output head is not adapted: the update would change the embeddings, too."""


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """`scale * up @ down` of (r, in) and (out, r) float32: an addition to a linear layer's weight.

    `name` is of the layer's module, as the format names it.
    """

    name: str
    down: NDArray[np.float32]
    up: NDArray[np.float32]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, (out, in)."""
        return len(self.up), self.down.shape[1]

    def delta(self) -> NDArray[np.float32]:
        """Return the (out, in) sum to add to the weight, in float32."""
        product: NDArray[np.float32] = np.float32(self.scale) * (self.up @ self.down)
        return product


def base_model(folder: Path) -> str | None:
    """Return the name of the model that an adapter was trained on; None if it is not stored.

    Raises a CheckpointError if the folder is no adapter.
    """
    config = read_config(folder, CONFIG, "an adapter's folder")
    base = config.get("base_model_name_or_path") or config.get("model")
    return base if isinstance(base, str) else None


def read_adapter(folder: Path) -> list[LowRankUpdate]:
    """Read the folder of a LoRA adapter.

    Raises a CheckpointError if the folder is no adapter, or damaged, and an UnsupportedModelError
    if the adapter has more than updates of linear layers.
    """
    config = read_config(folder, CONFIG, "an adapter's folder")
    if (folder / PEFT_WEIGHTS).is_file():
        return _read_peft(folder / PEFT_WEIGHTS, config)
    if (folder / MLX_WEIGHTS).is_file():
        return _read_mlx(folder / MLX_WEIGHTS, config)
    raise CheckpointError(
        f"{folder} has neither {PEFT_WEIGHTS} nor {MLX_WEIGHTS}; save the adapter as safetensors"
    )


def refuse_module(name: str, reason: str) -> UnsupportedModelError:
    """Return the error for a module that an adapter cannot be merged into."""
    return UnsupportedModelError(f"the adapter cannot be merged into {name}: {reason}")


def missing_layer(update: LowRankUpdate) -> str:
    """Return why an update is refused that fits no layer of the target."""
    return f"the target has no linear layer of this name and shape {update.shape}"


def merge_adapter(
    folder: Path,
    modules: Mapping[str, Any],
    problem: Callable[[Any], str | None],
    add: Callable[[Any, NDArray[np.float32]], None],
) -> None:
    """Add the updates of a LoRA adapter to the weights of a model.

    Args:
        folder: the adapter's.
        modules: the model's, by name.
        problem: says why no update can be added to a module with a weight; None if one can.
        add: adds an (out, in) update to the weight of a module.

    Raises a CheckpointError if the adapter is damaged, and an UnsupportedModelError if the adapter
    has other parts, or the model has no layer for one of them.
    """
    for update in read_adapter(folder):
        module = modules.get(update.name)
        weight = getattr(module, "weight", None)
        reason = None if weight is None else problem(module)
        if reason is None and (weight is None or weight.shape != update.shape):
            reason = missing_layer(update)
        if reason is not None:
            raise refuse_module(update.name, reason)
        add(module, update.delta())


def _read_peft(path: Path, config: Mapping[str, Any]) -> list[LowRankUpdate]:
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        kind = kind or "unknown"
        raise UnsupportedModelError(f"adapters of type {kind} are not supported; use LoRA")
    if refused := next((name for name in REFUSED if config.get(name)), None):
        raise UnsupportedModelError(f"adapters with {refused} are not supported")
    if config.get("bias", "none") != "none":
        raise UnsupportedModelError(f"adapters with bias {config['bias']!r} are not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise UnsupportedModelError(
            f"adapters with init_lora_weights {start!r} change the base model; convert the adapter "
            "to plain LoRA with PEFT"
        )
    pairs = _pairs(path, r"(?P<name>.+)\.lora_(?P<part>[AB])\.weight", "A")
    updates = []
    for stored, (down, up) in pairs.items():
        name = stored.removeprefix(PEFT_PREFIX)  # patterns may begin with the name of the module
        alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        if not isinstance(alpha, int | float):
            raise CheckpointError(f"{path.parent / CONFIG} has no lora_alpha")
        rank = len(down)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        updates.append(LowRankUpdate(name, down, up, scale))
    return updates


def _read_mlx(path: Path, config: Mapping[str, Any]) -> list[LowRankUpdate]:
    if (kind := config.get("fine_tune_type", "lora")) != "lora":
        raise UnsupportedModelError(f"adapters of type {kind!r} are not supported; use LoRA")
    scale = (config.get("lora_parameters") or {}).get("scale")
    if not isinstance(scale, int | float):
        raise CheckpointError(f"{path.parent / CONFIG} has no scale in lora_parameters")
    pairs = _pairs(path, r"(?P<name>.+)\.lora_(?P<part>[ab])", "a")
    return [LowRankUpdate(name, a.T, b.T, float(scale)) for name, (a, b) in pairs.items()]


def _pairs(
    path: Path, pattern: str, first: str
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return the two matrices of each layer, by the layer's name; other tensors are refused."""
    found: dict[str, dict[bool, NDArray[np.float32]]] = {}
    for key, tensor in read_file(path).items():
        match = re.fullmatch(pattern, key)
        if match is None or tensor.ndim != 2:
            raise UnsupportedModelError(
                f"the adapter has a tensor {key!r} of {tensor.ndim} dimensions, which is not part "
                "of a LoRA update of a linear layer"
            )
        parts = found.setdefault(match["name"], {})
        parts[match["part"] == first] = tensor.astype(np.float32)
    for name, parts in found.items():
        if len(parts) < 2:
            raise CheckpointError(f"{path} has only one of the two matrices of {name}")
    if not found:
        raise CheckpointError(f"{path} has no LoRA matrices")
    return {name: (parts[True], parts[False]) for name, parts in found.items()}


def _by_pattern(patterns: Any, name: str, default: Any) -> Any:
    """Return the value of the first pattern that a module's name ends with, as PEFT matches it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
