"""Images in prompts: where their tokens are, how these are positioned, and which images are equal.

The problem. A vision-language target turns an image into features, one for each of its placeholder
tokens in the prompt. These tokens all have one id, so that the ids no longer say what a state
depends on; the target may rotate them by positions in three axes instead of columns; and it may let
the tokens of an image see each other, also later ones.

The idea. Images are in prompts alone; everything after a prompt is text, whose rotary positions
differ from its columns by one number, the shift. So a prompt carries a `PromptImages`, and a
sequence remembers its `PromptPositions`. Columns count everything else: masks, windows and the KV
cache.

An example. Tokens 3 to 8 of a prompt stand for an image of 2 x 3 features, `v` and `w` are text:

    column    0 1 2   3 4 5   6 7 8   9 10
    token     v v v   x x x   x x x   w  w
    time      0 1 2   3 3 3   3 3 3   6  7
    height    0 1 2   3 3 3   4 4 4   6  7
    width     0 1 2   3 4 5   3 4 5   6  7

Text goes on after the largest position of the image, at 6, and has it on all axes. The shift is
8 - 11 = -3: the token in column 11 is rotated by 8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.suffix import SEPARATOR

NO_IMAGES: Mapping[int, bytes] = {}
"""The digests of a prompt without images; see `PromptImages.digests`."""


@dataclass(frozen=True, eq=False)
class Image:
    """One image of a prompt.

    Attributes:
        first, end: the image has the tokens first .. end - 1 of the prompt. Tokens between the
            features of one image, such as ends of lines, are among them.
        inputs: arguments of the target's vision tower for this image alone, by name.
    """

    first: int
    end: int
    inputs: Mapping[str, NDArray[Any]]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over the names, dtypes, shapes and bytes of the inputs."""
        code = hashlib.sha256()
        for name, x in sorted(self.inputs.items()):
            code.update(repr((name, x.dtype.str, x.shape)).encode())
            code.update(np.ascontiguousarray(x).tobytes())
        return code.digest()


@dataclass(frozen=True, eq=False)
class PromptImages:
    """The images of a prompt of n tokens, at least one, in the order of their tokens.

    Attributes:
        is_feature: (n,) bool, the tokens that stand for a feature of an image.
        positions: (3, n) int32 rotary positions of time, height and width; None if they are the
            columns.
        whole: whether the tokens of an image see each other, so that one pass must have them all.
    """

    images: Sequence[Image]
    is_feature: NDArray[np.bool_]
    positions: NDArray[np.int32] | None = None
    whole: bool = False

    @property
    def shift(self) -> int:
        """Rotary position minus column of all tokens after the prompt."""
        return 0 if self.positions is None else int(self.positions.max()) + 1 - len(self.is_feature)

    @cached_property
    def digests(self) -> Mapping[int, bytes]:
        """The digests of the images by their first tokens: what states depend on besides ids."""
        return {image.first: image.digest for image in self.images}

    def chunk_end(self, first: int, size: int) -> int:
        """Return where a chunk of about `size` tokens ends that begins at token `first`.

        If images are `whole`, it is not between two tokens of an image: the chunk ends before an
        image, or is larger if it begins with one.
        """
        end = min(first + size, len(self.is_feature))
        for image in self.images if self.whole else ():
            if image.first < end < image.end:
                end = image.first if image.first > first else image.end
        return end

    def features_in(self, first: int, end: int) -> list[tuple[Image, slice]]:
        """Return the images that have features among tokens first .. end - 1, and which ones."""
        found = []
        for image in self.images:
            start, stop = max(first, image.first), min(end, image.end)
            before = int(self.is_feature[image.first : start].sum())
            if start < stop and (count := int(self.is_feature[start:stop].sum())):
                found.append((image, slice(before, before + count)))
        return found

    def as_text(self, token_ids: Sequence[int]) -> list[int]:
        """Return the prompt's ids with a separator for each feature, which no draft may copy."""
        pairs = zip(token_ids, self.is_feature, strict=True)
        return [SEPARATOR if is_feature else token_id for token_id, is_feature in pairs]


@dataclass(frozen=True, eq=False)
class PromptPositions:
    """Rotary positions of a sequence, of which a prompt of n tokens has been run.

    Attributes:
        axes: (3, n) int32 rotary positions of the prompt; None if they are the columns.
        shift: rotary position minus column of the tokens after it.
    """

    axes: NDArray[np.int32] | None = None
    shift: int = 0

    def rows(self, first: int, end: int) -> NDArray[np.int32]:
        """Return the (3, end - first) positions of columns: time, height and width."""
        columns = np.arange(first + self.shift, end + self.shift, dtype=np.int32)
        text = np.broadcast_to(columns, (3, end - first))
        if self.axes is None or first >= self.axes.shape[1]:
            return text
        prompt = self.axes[:, first:end]
        return np.concatenate([prompt, text[:, prompt.shape[1] :]], 1)


@dataclass(frozen=True, eq=False)
class PrefillImages:
    """The images of a prompt while it is run, chunk by chunk."""

    prompt: PromptImages
    # features of images that the chunks so far have ended inside of, by the images' first tokens
    features: dict[int, Any] = field(default_factory=dict)

    def chunk_features(self, first: int, size: int, encode: Callable[[Image], Any]) -> list[Any]:
        """Return the features among `size` tokens, image by image; `encode` makes an image's."""
        parts, kept, end = [], {}, first + size
        for image, which in self.prompt.features_in(first, end):
            if (features := self.features.get(image.first)) is None:
                features = encode(image)
            parts.append(features[which])
            if image.end > end:
                kept[image.first] = features
        self.features.clear()
        self.features.update(kept)
        return parts


def locate(
    token_ids: Sequence[int], placeholder: int, inputs: Sequence[tuple[Mapping[str, Any], int]]
) -> tuple[list[Image], NDArray[np.bool_]]:
    """Find the tokens of each image in a prompt.

    Args:
        token_ids: of the prompt.
        placeholder: the id of tokens that stand for a feature.
        inputs: of each image for the vision tower, and the number of its features.

    Returns:
        The images, and `PromptImages.is_feature`.

    Raises:
        ValueError: the prompt has more placeholders than the images have features, or fewer.
    """
    is_feature = np.array(token_ids) == placeholder
    places, counts = np.flatnonzero(is_feature), [count for _, count in inputs]
    if len(places) != sum(counts):
        raise ValueError(f"{len(places)} placeholders for {sum(counts)} features of images")
    ends = np.cumsum(counts)
    return [
        Image(int(places[end - count]), int(places[end - 1]) + 1, arrays)
        for (arrays, count), end in zip(inputs, ends, strict=True)
    ], is_feature


def rotary_positions(
    is_feature: NDArray[np.bool_], grids: Iterable[Sequence[int]], merge: int
) -> NDArray[np.int32]:
    """Return the (3, n) rotary positions of a prompt of Qwen2-VL to Qwen3.6 or GLM-4.xV.

    Args:
        is_feature: (n,) tokens that stand for a feature; an image has consecutive ones.
        grids: (time, height, width) of each image in patches; its time is 1.
        merge: patches of a feature in height and in width.
    """
    positions = np.zeros((3, len(is_feature)), np.int32)
    places, column, position = np.flatnonzero(is_feature), 0, 0
    for _, patch_rows, patch_columns in grids:
        height, width = int(patch_rows) // merge, int(patch_columns) // merge
        first, places = int(places[0]), places[height * width :]
        positions[:, column:first] = position + np.arange(first - column)
        position += first - column
        column = first + height * width
        positions[:, first:column] = position
        rows, columns = np.divmod(np.arange(height * width), width)
        positions[1, first:column] += rows.astype(np.int32)
        positions[2, first:column] += columns.astype(np.int32)
        position += max(height, width)
    positions[:, column:] = position + np.arange(len(is_feature) - column)
    return positions
