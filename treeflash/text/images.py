"""Images of prompts, read from files, bytes, `data:` URLs and Pillow within fixed limits.

A request may hold anything: a file that claims 60,000 x 60,000 pixels in a hundred bytes, a JPEG
whose scans repeat for hours, half a file. So the header decides before anything is decoded, and
what a decoder raises is one line that names the image. Nothing is ever fetched from a network.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import threading
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.errors import ConfigError, PromptError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image | NDArray[np.uint8]"
"""The path of a file, the bytes of one, a `data:` URL in base64, an image of Pillow, or an image
that `read_images` has read."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_BYTES = 20 << 20
"""Most bytes of a file."""
MAX_MEGAPIXELS = 32
"""Most millions of pixels, by the header."""
MAX_SCANS = 200
"""Most scans of a JPEG. Encoders write about ten, and each decodes the whole image again: repeated
scans of 51 bytes each took 31 ms of 31 megapixels, hours in a file of `MAX_BYTES`."""
DATA_URL = "data:"
FETCHES_NOTHING = "images are never fetched; give the file, or a data: URL with its bytes"
_opening = threading.Lock()  # `catch_warnings` changes filters of the process


def is_path(source: ImageSource) -> bool:
    """Return whether a source names a file."""
    return isinstance(source, os.PathLike) or (
        isinstance(source, str) and not source.startswith(DATA_URL) and "://" not in source
    )


def read_images(sources: Sequence[ImageSource]) -> list[NDArray[np.uint8]]:
    """Read the images of a prompt; a PromptError names an image by its number, from 1."""
    images = []
    for number, source in enumerate(sources, 1):
        try:
            images.append(read_image(source))
        except PromptError as error:
            raise PromptError(f"image {number}: {error}") from None
    return images


def read_image(source: ImageSource) -> NDArray[np.uint8]:
    """Read the first frame of an image, upright, as (height, width, 3) uint8 RGB.

    EXIF data says which side is up. Transparent pixels lie on white. 16 bits of grey become 8.

    Raises:
        PromptError: the source is no image, or exceeds a limit.
        ConfigError: Pillow is not installed.
    """
    if isinstance(source, np.ndarray):
        return source
    if find_spec("PIL") is None:
        raise ConfigError("images need Pillow; pip install pillow")
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        return _decode(source)
    data = _read_bytes(source)
    if len(data) > MAX_BYTES:
        raise PromptError(f"the file has more than {MAX_BYTES >> 20} MiB")
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a limit is below
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise PromptError("the file is not a PNG, JPEG, WebP or GIF image") from None
    except Image.DecompressionBombError:
        raise PromptError(f"the image has more than {MAX_MEGAPIXELS} megapixels") from None
    except Exception as error:  # a decoder fails in many ways
        raise PromptError(f"the file is damaged: {first_line(error)}") from None
    with image:
        if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
            raise PromptError(f"the JPEG has more than {MAX_SCANS} scans")
        return _decode(image)


def data_url(path: Path) -> str:
    """Return an image file as a `data:` URL; raises what `read_image` does."""
    data = _read_bytes(path)
    read_image(data)
    return f"data:;base64,{base64.b64encode(data).decode()}"


def _read_bytes(source: str | os.PathLike[str] | bytes) -> bytes:
    """Read a file of at most `MAX_BYTES`, and one byte more of a larger one."""
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str | os.PathLike):
        raise PromptError(
            "an image is a path, bytes, a data: URL or an image of Pillow, got "
            f"{type(source).__name__}"
        )
    text = os.fspath(source)
    if not is_path(source):
        if text.startswith(DATA_URL):
            return _read_data_url(text)
        raise PromptError(f"{text} is a URL, and {FETCHES_NOTHING}")
    path = Path(text)
    try:
        if path.exists() and not path.is_file():
            raise PromptError(f"{text} is not a file")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PromptError(f"{text} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null byte
        raise PromptError(f"{text!r} cannot be read: {error}") from None


def _read_data_url(url: str) -> bytes:
    """Decode a `data:` URL, whose media type the bytes make superfluous."""
    head, comma, payload = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise PromptError("a data: URL of an image must have the form data:image/png;base64,...")
    payload = "".join(payload.split())  # some programs break base64 into lines
    if len(payload) // 4 * 3 > MAX_BYTES + 2:
        raise PromptError(f"the file has more than {MAX_BYTES >> 20} MiB")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PromptError(f"the data: URL is not base64: {first_line(error)}") from None


def _decode(image: Image) -> NDArray[np.uint8]:
    """Decode an image within the limit of pixels."""
    from PIL import Image, ImageOps

    width, height = image.size
    if width * height > MAX_MEGAPIXELS * 10**6:
        raise PromptError(
            f"the image has {width} x {height} pixels, more than {MAX_MEGAPIXELS} megapixels"
        )
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would cut off what exceeds 8 bits
            grey = np.asarray(image) >> 8
            image = Image.fromarray(grey.astype(np.uint8))
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        pixels: NDArray[Any] = np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # a decoder fails in many ways
        raise PromptError(f"the image cannot be decoded: {first_line(error)}") from None
    return pixels
