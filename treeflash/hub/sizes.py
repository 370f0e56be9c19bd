"""Sizes of models, so that a pair that does not fit is refused before it is fetched.

The hub tells the sizes of files without sending them. What it cannot tell, because it is not
reached or has no such model, is left to the fetch itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from treeflash.config import GIB
from treeflash.errors import ConfigError
from treeflash.hub.models import SELF, local_folder
from treeflash.hub.published import BUNDLED_DRAFTER, published_drafter

PRECISION = re.compile(r"-(?:(?:mlx-)?(\d+)bit|bf16|fp16)$", re.IGNORECASE)
"""The end of the name of a conversion."""
CONVERSIONS = (8, 6, 4)
CONVERTER = "mlx-community"
"""Publishes conversions of models under their names."""
COMMON_TARGETS = (
    "mlx-community/Qwen3-14B-8bit",
    "mlx-community/Qwen3-8B-8bit",
    "mlx-community/Qwen3-4B-8bit",
    "mlx-community/Qwen3-4B-4bit",
    "mlx-community/Qwen3-1.7B-4bit",
)
"""Targets with published drafters, the largest first."""


def weights_bytes(name: str | None) -> int:
    """Return the bytes of a model's weights, by its folder or hub id; 0 if they are unknown."""
    if name in (None, SELF, BUNDLED_DRAFTER):  # in the target's folder, or small
        return 0
    if (folder := local_folder(name)) is not None:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    from treeflash.hub.client import published_bytes  # its imports take longer than `--help`

    return published_bytes(str(name))


def parameter_count(folder: Path) -> int | None:
    """Count the weights of a model from the heads of its files; None if numbers pack several."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                if not part.get_dtype().startswith(("F", "BF")):
                    return None
                count += math.prod(part.get_shape())
    return count


def refuse_pair(target: str | None, drafter: str | None, limit: int) -> None:
    """Raise a ConfigError if the weights of a pair have more than `limit` bytes.

    It names the largest of the smaller choices that fits.
    """
    size = weights_bytes(target) + weights_bytes(drafter)
    if target is None or size <= limit:
        return
    advice = "use a smaller model"
    for name in smaller_choices(target):
        weights = weights_bytes(name)
        pair = weights + weights_bytes(published_drafter(name))
        if weights and pair <= limit:
            advice = f"use {name}, {pair / GIB:.1f} GiB"
            break
    raise ConfigError(
        f"the weights of {target}{' and its drafter' if drafter else ''} have {size / GIB:.1f} "
        f"GiB, and this GPU has {limit / GIB:.1f} GiB for models and texts; {advice} (--force "
        "fetches and loads them nevertheless)"
    )


def smaller_choices(target: str) -> Iterator[str]:
    """Yield conversions of a target in fewer bits, and then smaller targets."""
    found = PRECISION.search(target)
    bits = int(found[1]) if found is not None and found[1] else 16
    publisher, _, model = target[: found.start() if found else None].rpartition("/")
    if found is None:
        publisher = CONVERTER
    kind = "MLX-" if found is not None and "mlx-" in found[0].lower() else ""
    smaller = [f"{publisher}/{model}-{kind}{n}bit" for n in CONVERSIONS if n < bits]
    yield from smaller
    yield from (name for name in COMMON_TARGETS if name.lower() != target.lower())
