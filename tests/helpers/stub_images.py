"""A processor of images for pairs without a vision tower, and images in the forms of clients."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from byte_tokens import SPECIAL
from numpy.typing import NDArray
from PIL import Image as Pillow

from treeflash.decoding.images import Image, PromptImages
from treeflash.errors import PromptError
from treeflash.text.tokenizer import Tokenizer

FEATURES = 4


class StubProcessor:
    """Turns an image into tokens that the mean colours of its quarters choose.

    The tokens are in the vocabulary, so that a target without a tower answers differently to
    different images.
    """

    placeholder = "<image>"
    chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}: {% if m.content is string %}{{ m.content }}"
        "{% else %}{% for x in m.content %}{{ x.text if x.type == 'text' else '<image>' }}"
        "{% endfor %}{% endif %}<|end|>{% endfor %}<|start|>assistant: "
    )

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []

    def encode(
        self, text: str, pictures: Sequence[NDArray[np.uint8]]
    ) -> tuple[list[int], PromptImages]:
        self.texts.append(text)
        first, *others = text.split(self.placeholder)
        if len(others) != len(pictures):
            raise PromptError(f"{len(others)} placeholders for {len(pictures)} images")
        ids, images = self.tokenizer.encode_continuation(first), []
        for picture, after in zip(pictures, others, strict=True):
            means = [int(quarter.mean()) if quarter.size else 0 for quarter in quarters(picture)]
            tokens = [len(SPECIAL) + mean for mean in means]
            images.append(Image(len(ids), len(ids) + FEATURES, {"pixels": np.array(tokens)}))
            ids += [*tokens, *self.tokenizer.encode_continuation(after)]
        is_feature = np.zeros(len(ids), np.bool_)
        for image in images:
            is_feature[image.first : image.end] = True
        return ids, PromptImages(images, is_feature)


def quarters(picture: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [part for half in np.array_split(picture, 2) for part in np.array_split(half, 2, 1)]


def written(image: Pillow.Image, format: str, **settings: object) -> bytes:
    """Return the bytes of a file with an image."""
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def picture(seed: int = 0, size: int = 16) -> bytes:
    """A PNG of four random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    return written(Pillow.fromarray(colours.repeat(size // 2, 0).repeat(size // 2, 1)), "PNG")


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    code = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", code)


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url_of(data: bytes) -> str:
    return f"data:image/png;base64,{base64_of(data)}"
