"""Images in prompts: mlx-vlm's processors and towers, and the inputs of chunks with features.

mlx-lm's text models stay the targets. mlx-vlm has vision towers and how their features become
embeddings of the text; its own text models are never run, and their weights not read. Each image is
encoded alone, as a prompt of its placeholders.

mlx-vlm changes transformers when it is imported, so that it is imported only for images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from treeflash.decoding.families import ImageFamily, family_of
from treeflash.decoding.image_processor import placeholder_id
from treeflash.decoding.images import Image, PromptImages
from treeflash.drafters.backbone import rope_parameters, rotary_axes
from treeflash_mlx.state import State


@dataclass(frozen=True, eq=False)
class Features:
    """The features of an image, or of some of its tokens."""

    rows: mx.array  # (n, hidden_size) embeddings, as the table has them
    deep: mx.array | None  # (layers, n, hidden_size) that are added to the first layers' outputs

    def __getitem__(self, tokens: slice) -> Features:
        return Features(self.rows[tokens], None if self.deep is None else self.deep[:, tokens])


@dataclass(frozen=True, eq=False)
class ImageRows:
    """What a pass over a chunk with features has in place of embeddings of its tokens."""

    token_ids: mx.array  # (1, n), the padding token at features
    embeddings: mx.array  # (1, n, hidden_size)
    deep: mx.array | None  # (layers, 1, n, hidden_size), 0 at tokens of text
    # (n, n), which tokens are of the same image, if these see each other.
    is_seen: NDArray[np.bool_] | None
    sliding: bool  # whether they do so in sliding layers alone


class VisionTower:
    """A model of mlx-vlm without its decoder."""

    def __init__(
        self,
        model: Any,  # model of mlx-vlm, whose weights are not read yet
        config: Mapping[str, Any],  # configuration of the target
        embed: Callable[[mx.array], mx.array],  # embedding of the target
        dtype: mx.Dtype,  # dtype of the target
    ) -> None:
        decoder = model.language_model.model
        decoder.layers = []
        decoder.embed_tokens = embed
        # Gemma 4's embeddings are scaled in mlx-vlm before its decoder, and in mlx-lm by it.
        self.scale: float = getattr(decoder, "embed_scale", 1.0)
        # mlx-vlm divides features by a function of it, with a default.
        model.config.hidden_size = model.config.text_config.hidden_size
        model.audio_tower = model.embed_audio = None  # sounds are refused
        family, text = family_of(config["model_type"]).images, config.get("text_config", config)
        self.sliding = isinstance(family, ImageFamily) and family.sliding
        self.placeholder, self.padding = placeholder_id(config), text.get("pad_token_id") or 0
        self.model, self.embed, self.dtype = model, embed, dtype

    @property
    def arrays(self) -> list[mx.array]:
        """The weights outside of the decoder."""
        parts = {x: y for x, y in self.model.children().items() if x != "language_model"}
        return [x for _, x in tree_flatten(parts) if isinstance(x, mx.array)]

    def encode(self, images: PromptImages, image: Image) -> Features:
        count = int(images.is_feature[image.first : image.end].sum())
        inputs = {name: mx.array(x) for name, x in image.inputs.items()}
        ids = mx.full((1, count), self.placeholder, mx.int32)
        made = self.model.get_input_embeddings(ids, mask=mx.ones((1, count), mx.int32), **inputs)
        deep = made.deepstack_visual_embeds
        if deep is not None:
            deep = mx.stack(list(deep)).astype(self.dtype)
        features = Features((made.inputs_embeds[0] / self.scale).astype(self.dtype), deep)
        mx.eval(features.rows, features.deep)
        return features

    def rows(self, state: State, token_ids: Sequence[int]) -> ImageRows | None:
        """Return the embeddings of the next tokens of a prompt; None if no token is a feature."""
        first, size = state.length, len(token_ids)
        if state.images is None or not state.has_features(token_ids):
            return None
        images, end = state.images.prompt, first + size
        found, encode = images.features_in(first, end), partial(self.encode, images)
        parts = state.images.chunk_features(first, size, encode)
        is_feature = images.is_feature[first:end]
        places = mx.array(np.flatnonzero(is_feature).astype(np.int32))
        text = mx.array(np.where(is_feature, self.padding, token_ids).astype(np.int32))
        embeddings = self.embed(text)
        embeddings[places] = mx.concatenate([part.rows for part in parts])
        deep = None
        layers = [part.deep for part in parts if part.deep is not None]
        if layers:
            deep = mx.zeros((len(layers[0]), *embeddings.shape), embeddings.dtype)
            deep[:, places] = mx.concatenate(layers, 1)
            deep = deep[:, None]
        is_seen = None
        if images.whole:
            number = np.zeros(end - first, np.int32)
            for i, (image, _) in enumerate(found, 1):
                number[max(image.first - first, 0) : image.end - first] = i
            number[~is_feature] = 0
            is_seen = (number[:, None] == number) & is_feature
        return ImageRows(text[None], embeddings[None], deep, is_seen, self.sliding)


def channel_axes(config: Mapping[str, Any]) -> NDArray[np.int32] | None:
    """Return which axis of rotary positions turns each channel of a head of a text configuration.

    They are (rotated,); channels j and j + half have the same. None stands for one axis.
    """
    rope = {"mrope_interleaved": "linear_num_value_heads" in config} | rope_parameters(config)
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    axes = rotary_axes(rope, int(width * rope["partial_rotary_factor"]) // 2)
    return None if axes is None else np.array(axes * 2, np.int32)


def read_processor(folder: Path) -> Any:
    """Read the processor of a folder by mlx-vlm's classes, which need no other framework."""
    from mlx_vlm.utils import get_model_and_args, load_config, load_processor

    get_model_and_args(load_config(folder))  # the module of the model registers its processor
    return load_processor(folder, add_detokenizer=False)


def load_tower(
    folder: Path, config: Mapping[str, Any], embed: Callable[[mx.array], mx.array], dtype: mx.Dtype
) -> VisionTower:
    from mlx_vlm.utils import load_model

    tower = VisionTower(load_model(folder, lazy=True), config, embed, dtype)
    mx.eval(tower.arrays)
    return tower
