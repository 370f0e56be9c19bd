"""Images in prompts: the processor, the vision tower, and the inputs of chunks with features.

A vision-language model of transformers is a decoder with some modules beside it: the tower, which
turns an image into features in the space of the decoder's embeddings. The tower is taken out of the
model, so that everything that treeflash does to the layers of a target concerns the decoder alone.
It is put back for the time of a call. Each image is encoded alone; so its features depend on
nothing else, whatever other images a prompt or a batch has.

A pass over a chunk that has features gets the features of its rows as the output of the tower, in
the form in which transformers splits prompts itself (`mm_encoder_outputs`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.config import LoadConfig
from treeflash.decoding.families import ImageFamily, image_family
from treeflash.decoding.image_processor import (
    TOKEN_TYPES,
    Processor,
    image_samples,
    load_processor,
)
from treeflash.decoding.images import Image, PromptImages
from treeflash.decoding.probe import ImageSample
from treeflash.errors import ConfigError, PromptError
from treeflash_cuda.state import State

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Features:
    """The features of an image, or of some of its tokens, as its model returns them."""

    kind: type  # the class of the tower's output
    rows: Tensor  # (n, hidden_size) in the order of the tokens
    deep: tuple[Tensor, ...]  # (n, hidden_size) that are added to the first layers
    as_tensor: bool  # whether `rows` were a tensor, and not a list of one for each image

    @classmethod
    def of(cls, output: Any) -> Features:
        """Return the features of an output of the tower for one image."""
        deep = output.get("deepstack_features") or ()
        as_tensor = isinstance(output.pooler_output, Tensor)
        return cls(type(output), _rows(output.pooler_output), tuple(map(_rows, deep)), as_tensor)

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """Return the features of several images one after another."""
        deep = zip(*(part.deep for part in parts), strict=True)
        rows = torch.cat([part.rows for part in parts])
        return cls(parts[0].kind, rows, tuple(map(torch.cat, deep)), parts[0].as_tensor)

    def __getitem__(self, tokens: slice) -> Features:
        deep = tuple(layer[tokens] for layer in self.deep)
        return Features(self.kind, self.rows[tokens], deep, self.as_tensor)

    def repeat(self, times: int) -> Features:
        """Return the features of one token for several equal rows."""
        return Features.joined([self] * times)

    def output(self) -> Any:
        """Return an output of the tower that has these features."""
        made = self.kind(pooler_output=self.rows[None] if self.as_tensor else [self.rows])
        if self.deep:
            made["deepstack_features"] = [[layer] for layer in self.deep]
        return made


def _rows(parts: Any) -> Tensor:
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


@dataclass(frozen=True, eq=False)
class ImageRows:
    """The rows of a chunk that has features."""

    features: Features  # features of the rows that stand for them, in order
    # (1, end) int32 token types up to the end of the chunk; None if images are not whole.
    types: Tensor | None

    def repeat(self, times: int) -> ImageRows:
        """Return the rows of a chunk of one token that is repeated; see `Target.token_rows`."""
        return ImageRows(self.features.repeat(times), self.types)


def has_tower(model: PreTrainedModel) -> bool:
    """Return whether a model has modules beside its decoder that treeflash knows how to use."""
    is_known = isinstance(image_family(model.config.model_type, "cuda"), ImageFamily)
    return is_known and model.base_model is not model.get_decoder()


class VisionTower:
    """The modules of a vision-language model besides its decoder and its output head."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take the modules out of a model."""
        self._model: Any = model
        self._base: nn.Module = model.base_model
        decoder = model.get_decoder()
        self.modules = {x: y for x, y in self._base.named_children() if y is not decoder}
        for name in self.modules:
            setattr(self._base, name, None)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the modules back for the time of a call."""
        for name, module in self.modules.items():
            setattr(self._base, name, module)
        try:
            yield
        finally:
            for name in self.modules:
                setattr(self._base, name, None)

    @property
    def parameters(self) -> set[nn.Parameter]:
        return {x for module in self.modules.values() for x in module.parameters()}

    def encode(self, image: Image) -> Features:
        """Compute the features of an image."""
        inputs = device_inputs(image, self._model.device, self._model.dtype)
        with self.attached():
            return Features.of(self._model.get_image_features(**inputs, return_dict=True))

    def rows(self, state: State, size: int) -> ImageRows:
        """Return the features of the next `size` tokens of a prompt, which has some there."""
        images, end = state.images, state.length + size
        assert images is not None
        parts, types = images.chunk_features(state.length, size, self.encode), None
        if images.prompt.whole:
            types = torch.from_numpy(images.prompt.is_feature[:end].astype(np.int32))[None]
            types = types.to(parts[0].rows.device)
        return ImageRows(Features.joined(parts), types)


class GivenFeatures(VisionTower):
    """Features that `generate` of transformers has computed before it calls a decoding loop.

    The model keeps its tower. The features are an image's inputs, in float32, which holds all
    numbers of half precision.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self.modules = model, {}
        self._like: Features | None = None  # features like the latest call's, without rows

    def prompt_images(
        self,
        prompts: Sequence[Sequence[int]],
        output: Any,
        positions: Sequence[NDArray[np.int32] | None],
    ) -> list[PromptImages | None]:
        """Return the images of prompts; None for those that have none.

        Args:
            prompts: the token ids of each prompt.
            output: the tower's, for the images of all prompts in order.
            positions: (3, n) rotary positions of each prompt; None if they are its columns.

        Raises:
            ConfigError: there are more placeholders than features, or fewer.
        """
        family = image_family(self._model.config.model_type, "cuda")
        assert isinstance(family, ImageFamily)
        features = Features.of(output)
        self._like = features[:0]
        arrays = [x.float().cpu().numpy() for x in (features.rows, *features.deep)]
        found: list[PromptImages | None] = []
        start = 0
        for ids, axes in zip(prompts, positions, strict=True):
            is_feature = np.array(ids) == self._model.config.image_token_id
            ends = np.flatnonzero(np.diff(is_feature.astype(np.int8), prepend=0, append=0))
            images = []
            for first, end in ends.reshape(-1, 2).tolist():
                stop = start + end - first
                inputs = {str(n): x[start:stop] for n, x in enumerate(arrays)}
                images.append(Image(first, end, inputs))
                start = stop
            found.append(PromptImages(images, is_feature, axes, family.whole) if images else None)
        if start != len(features.rows):
            raise ConfigError(f"{start} placeholders for {len(features.rows)} features of images")
        return found

    def encode(self, image: Image) -> Features:
        assert self._like is not None
        like = self._like.rows
        rows, *deep = (
            torch.from_numpy(x).to(like.device, like.dtype) for x in image.inputs.values()
        )
        return replace(self._like, rows=rows, deep=tuple(deep))


class NoPictures:
    """`treeflash.decoding.interfaces.ImageProcessor` of a target that is given features."""

    chat_template: str | None = None
    placeholder = ""

    def encode(
        self, text: str, pictures: Sequence[NDArray[np.uint8]]
    ) -> tuple[list[int], PromptImages]:
        raise PromptError("give the images to the processor of transformers")


def run_samples(model: Any, processor: Processor) -> list[ImageSample]:
    """Run the prompts of the check through a model that nothing has changed yet."""
    parameters = inspect.signature(type(model).forward).parameters

    @torch.inference_mode()
    def logits(ids: Sequence[int], images: PromptImages) -> Any:
        types = torch.from_numpy(images.is_feature.astype(np.int64))[None].to(model.device)
        inputs = device_inputs(images.images[0], model.device, model.dtype)
        inputs |= {name: types for name in TOKEN_TYPES if name in parameters}
        tokens = torch.tensor([ids], device=model.device)
        made = model(input_ids=tokens, **inputs, use_cache=False, logits_to_keep=1).logits
        return made[0, -1].float().cpu().numpy()

    return image_samples(processor, logits)


def device_inputs(image: Image, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the inputs of an image on a device, and pixels in a dtype."""
    tensors = {name: torch.from_numpy(x).to(device) for name, x in image.inputs.items()}
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def read_processor(folder: Path) -> Any:
    """Read the processor of a folder, as transformers reads it."""
    from transformers import AutoProcessor  # its import takes time, which texts do not need

    return AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def find_processor(
    folder: Path, config: Any, settings: LoadConfig, *, split: bool
) -> Processor | str:
    """Read the processor of images of a target; or return why it takes none, as a clause.

    Args:
        folder: the target's folder.
        config: the target's configuration.
        settings: what is loaded, and how.
        split: whether other processes have parts of its layers.
    """
    refusals = {
        "it was loaded without its vision tower": not settings.images,
        "they do not work under torchrun": split,
        "they do not work with device_map": settings.device_map is not None,
        "they do not work with an adapter": bool(settings.adapter),
    }
    reason = next((reason for reason, applies in refusals.items() if applies), None)
    return reason or load_processor(folder, config.to_dict(), "cuda", read_processor)
