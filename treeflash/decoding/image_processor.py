"""Processors of images in the interface of transformers, as the backends' packages have them.

A backend reads the processor of a folder. Everything else about processors is here.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.families import ImageFamily, image_family
from treeflash.decoding.images import PromptImages, locate, rotary_positions
from treeflash.decoding.probe import ImageSample
from treeflash.errors import PromptError, first_line

TOKEN_TYPES = "token_type_ids", "mm_token_type_ids"
"""Arguments of models for 1 where a token stands for a feature, from the start of the sequence."""
TEXT_INPUTS = "input_ids", "attention_mask", *TOKEN_TYPES
"""Results of processors that are not of an image."""
PLACEHOLDER_IDS = "image_token_id", "image_token_index"
"""Settings with the token id that stands for a feature."""
KEPT_PICTURES = 16
"""Pictures whose inputs are kept, because a chat sends its pictures with every turn."""


class Processor:
    """`treeflash.decoding.interfaces.ImageProcessor` around a processor of transformers."""

    def __init__(
        self,
        processor: Any,  # a processor of transformers, or something that is called like it
        family: ImageFamily,
        feature_id: int,  # the token id that stands for a feature
        merge: int,  # patches of a feature in height and in width, with three axes
    ) -> None:
        self.chat_template: str | None = getattr(processor, "chat_template", None)
        self.placeholder: str = getattr(processor, family.placeholder)
        self._processor = processor
        self.family = family
        self._feature_id = feature_id
        self._merge = merge
        self._kept: OrderedDict[bytes, tuple[Mapping[str, NDArray[Any]], int]] = OrderedDict()
        self._lock = Lock()

    def encode(
        self, text: str, pictures: Sequence[NDArray[np.uint8]]
    ) -> tuple[list[int], PromptImages]:
        if (found := text.count(self.placeholder)) != len(pictures):
            raise PromptError(
                f"the prompt contains {self.placeholder!r} {found} times for {len(pictures)} "
                "images; remove it from the text"
            )
        bos = self._processor.tokenizer.bos_token
        has_bos = bos is not None and text.startswith(bos)
        made = self._call(text, pictures, add_special_tokens=not has_bos)
        ids = np.asarray(made["input_ids"])[0].tolist()
        inputs = [self._inputs(picture) for picture in pictures]
        try:
            images, is_feature = locate(ids, self._feature_id, inputs)
        except ValueError as error:
            raise PromptError(
                f"the prompt has {error}; remove the target's image tokens from the text"
            ) from error
        positions = None
        if self.family.three_axes:
            grids = [image.inputs["image_grid_thw"][0] for image in images]
            positions = rotary_positions(is_feature, grids, self._merge)
        return ids, PromptImages(images, is_feature, positions, self.family.whole)

    def _inputs(self, picture: NDArray[np.uint8]) -> tuple[Mapping[str, NDArray[Any]], int]:
        """Return the inputs of the tower for a picture alone, and the number of its features."""
        key = hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).digest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = self._call(self.placeholder, [picture], add_special_tokens=False)
        count = int((np.asarray(made["input_ids"]) == self._feature_id).sum())
        arrays = {name: np.asarray(x) for name, x in made.items() if name not in TEXT_INPUTS}
        with self._lock:
            self._kept[key] = arrays, count
            if len(self._kept) > KEPT_PICTURES:
                self._kept.popitem(last=False)
        return arrays, count

    def _call(
        self, text: str, pictures: Sequence[NDArray[np.uint8]], *, add_special_tokens: bool
    ) -> Mapping[str, Any]:
        from PIL import Image as Picture  # only needed here

        try:
            made: Mapping[str, Any] = self._processor(
                text=[text],
                images=[Picture.fromarray(picture) for picture in pictures],
                return_tensors="np",
                add_special_tokens=add_special_tokens,
            )
        except ValueError as error:  # a picture is too narrow, for example
            raise PromptError(f"the target cannot take this image: {first_line(error)}") from error
        return made


def load_processor(
    folder: Path, config: Mapping[str, Any], backend: str, read: Callable[[Path], Any]
) -> Processor | str:
    """Load the processor of a target; or return why it takes no images, as a clause.

    Args:
        folder: the target's.
        config: the target's configuration.
        backend: the name of the backend that will run the images.
        read: reads a folder's processor in the interface of transformers.
    """
    family = image_family(config.get("model_type"), backend)
    if not isinstance(vision := config.get("vision_config"), Mapping):
        return "it has no vision tower"
    if isinstance(family, str):
        return family
    if all(config.get(name) is None for name in PLACEHOLDER_IDS):
        return "its configuration does not say which token stands for an image"
    family = family.for_config(config.get("text_config", config))
    merge = int(vision.get("spatial_merge_size", 2))  # it counts with three axes alone
    try:
        return Processor(read(folder), family, placeholder_id(config), merge)
    except ImportError as error:
        return (
            f"its processor needs a package that is not installed ({first_line(error)}); "
            f"pip install '.[{backend}-images]' in a clone of treeflash"
        )
    except Exception as error:  # the folder lacks files of the processor, among others
        return f"its folder has no usable processor ({first_line(error)})"


def placeholder_id(config: Mapping[str, Any]) -> int:
    """Return the token id that stands for a feature."""
    return next(int(config[name]) for name in PLACEHOLDER_IDS if config.get(name) is not None)


def image_samples(
    processor: Processor,
    logits: Callable[[Sequence[int], PromptImages], NDArray[np.float32]] | None = None,
) -> list[ImageSample]:
    """Return two prompts with an image for the check at load: noise, and noise with a dark half.

    `logits` returns what the framework's own model predicts after a prompt; None where it has no
    model.
    """
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    dark = noise.copy()
    dark[24:] //= 8
    samples = []
    for picture in (noise, dark):
        ids, images = processor.encode(f"{processor.placeholder} In this image", [picture])
        samples.append(ImageSample(ids, images, None if logits is None else logits(ids, images)))
    return samples
