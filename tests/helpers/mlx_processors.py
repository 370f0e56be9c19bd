"""The processors of mlx-vlm, for a separate process: it changes transformers' classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from image_models import picture
from treeflash_mlx.images import load_tower, read_processor

from treeflash.decoding.image_processor import Processor, load_processor
from treeflash.drafters.folder import read_config
from treeflash.errors import PromptError

TEXT = "ab{0}cd{0}ef"
EXTREMES = (1, 1), (1, 20_000), (20_000, 1), (3, 700)


def pictures(sizes: list[tuple[int, int]]) -> list[Any]:
    return [picture(seed, *size) for seed, size in enumerate(sizes)]


def encode(processor: Processor | str, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """The ids of a prompt with pictures, and what becomes of pictures of extreme shapes."""
    assert isinstance(processor, Processor), processor
    ids, images = processor.encode(TEXT.format(processor.placeholder), pictures(sizes))
    extremes: dict[Any, Any] = {}
    for size in EXTREMES:
        try:
            extremes[size] = processor.encode(processor.placeholder, pictures([size]))[0]
        except PromptError as error:
            extremes[size] = str(error)
    counts = [int(images.is_feature[x.first : x.end].sum()) for x in images.images]
    return {"ids": ids, "images": images, "counts": counts, "extremes": extremes}


def run(folder: Path, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Encode by the processor of mlx-vlm; and the features of its tower."""
    mx.set_default_device(mx.cpu)
    config = read_config(folder)
    found = encode(load_processor(folder, config, "mlx", read_processor), sizes)
    width = config.get("text_config", config)["hidden_size"]
    tower = load_tower(folder, config, lambda ids: mx.zeros((*ids.shape, width)), mx.float32)
    images = found.pop("images").images
    found["features"] = [
        np.array(tower.encode(image, count).rows)
        for image, count in zip(images, found["counts"], strict=True)
    ]
    return found
