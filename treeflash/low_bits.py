"""Weights as integers of 4 to 8 bits in groups: what GGUF's types store, and how a CPU reads it.

A product of few rows takes as long as reading its weight, so a weight stays in the bits that its
file has. A weight of a linear layer has a row for each output. 32 consecutive numbers of a row are
a group with a scale, or two, of 16 numbers each, and perhaps with a least number:

    weight = number * scale + least      without a sign: 0 to 15, 31, 63 or 255
    weight = (number - half) * scale     with a sign: half is 8, 16, 32 or 128

With the scale 0.5 and the least number -3, the numbers 0, 6 and 15 are the weights -3, 0 and 4.5.

Some types have scales and least numbers of 8 bits: 256 numbers of a row share a float16 factor of
their scales, and one of their least numbers. The products are exact in float32.

No weight changes: a `LowBitWeight` has bit for bit the values that the package gguf dequantises.
The entries of IQ4's table are stored in 8 bits.

`pack` puts what is multiplied at once together in memory. 16 rows are a block. A block has the
lines of one group after the other: 64 bytes with 4 consecutive numbers of each row. Of numbers with
4 to 6 bits a byte has the lower 4 bits of two lines, which are those bits of the first one, and
then of the second one. Behind them, a byte has the fifth bits of eight lines, or the upper two bits
of four lines, the first one's lowest. The last block is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

from treeflash.errors import CheckpointError

GROUP = 32
"""Numbers of a group; a row has a multiple of them."""
BLOCK_ROWS = 16
"""Rows of a block."""
LINE = 4
"""Numbers of a row in a line."""
SHARING = 256
"""Numbers of a row that share factors: a block of llama.cpp's K types."""
METHOD = "treeflash"
"""The `quant_method` of folders with packed weights."""
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

Numbers: TypeAlias = NDArray[np.uint8]
Scales: TypeAlias = NDArray[np.floating[Any]] | NDArray[np.int8]
Factors: TypeAlias = NDArray[np.float16]


class Parts(NamedTuple):
    """What the (n, bytes) blocks of a type hold, each in the order of the weights."""

    numbers: Numbers
    scales: Scales
    least: Scales | None = None
    factors: Factors | None = None  # (n, 1 or 2): the factor of scales, and of least numbers


class LowBitFormat(NamedTuple):
    """What a kernel has to know of a weight besides its size."""

    bits: int  # bits of a stored number: 4, 5, 6 or 8
    scales: int  # scales of a group: 1 or 2
    has_least: bool  # whether a group has a least number; otherwise numbers have a sign
    scale_dtype: str  # type of scales and least numbers: float16, float32 or int8

    @property
    def half(self) -> int:
        """What is subtracted from a stored number."""
        return 0 if self.has_least else 1 << (self.bits - 1)

    @property
    def lines(self) -> int:
        """Number of lines of a group."""
        return self.bits

    @property
    def factors(self) -> int:
        """How many factors `SHARING` numbers share."""
        return 1 + self.has_least if self.scale_dtype == "int8" else 0


class LowBitWeight(NamedTuple):
    """The (rows, size) weight of a linear layer."""

    numbers: Numbers  # (rows, size) as they are stored
    scales: Scales  # (rows, groups * scales of a group)
    least: Scales | None  # (rows, groups); None if numbers have a sign
    bits: int
    # (rows, size / 256 * factors of 256 numbers); None unless scales are int8.
    factors: Factors | None = None
    # (size,) the input that each number of a row multiplies; None if they are in order.
    order: NDArray[np.int64] | None = None

    @property
    def format(self) -> LowBitFormat:
        """What a kernel has to know of it."""
        scales = self.scales.shape[1] * GROUP // self.numbers.shape[1]
        return LowBitFormat(self.bits, scales, self.least is not None, self.scales.dtype.name)

    def dequantised(self) -> NDArray[np.float32]:
        """Return the weight in float32."""
        rows, size = self.numbers.shape
        numbers = self.numbers.astype(np.float32).reshape(*self.scales.shape, -1)
        scales = self._widened(self.scales, 0)[..., None]
        values: NDArray[np.float32] = (numbers - np.float32(self.format.half)) * scales
        if self.least is not None:
            values += self._widened(self.least, 1)[..., None]
        values = values.reshape(rows, size)
        return values if self.order is None else values[:, np.argsort(self.order)]

    def _widened(self, stored: Scales, factor: int) -> NDArray[np.float32]:
        """Return scales, or least numbers, times one of the factors that they share."""
        values = stored.astype(np.float32)
        if self.factors is None:
            return values
        shared = self.factors[:, factor :: self.format.factors].astype(np.float32)
        return values * shared.repeat(values.shape[1] // shared.shape[1], 1)

    def pack(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that kernels read, in the order of blocks, groups and lines.

        They have the names and shapes of `StoredWeight.tensors`; and `order`, if it is not None.
        """
        rows, size = self.numbers.shape
        missing, groups = -rows % BLOCK_ROWS, size // GROUP
        numbers = np.pad(self.numbers, ((0, missing), (0, 0)))
        lines = numbers.reshape(-1, BLOCK_ROWS, groups, GROUP // LINE, LINE).transpose(
            0, 2, 3, 1, 4
        )
        if self.bits < 8:
            parts = [lines[:, :, 0::2] & 15 | lines[:, :, 1::2] << np.uint8(4)]
            if self.bits > 4:
                shared = lines_of_byte(self.bits)
                places = np.arange(shared, dtype=np.uint8) * np.uint8(8 // shared)
                upper = (lines >> 4).reshape(len(lines), groups, -1, shared, BLOCK_ROWS, LINE)
                parts.append(np.bitwise_or.reduce(upper << places[:, None, None], 3))
            lines = np.concatenate(parts, 2)
        packed = np.ascontiguousarray(lines).reshape(*lines.shape[:3], BLOCK_ROWS * LINE)
        others = {"scales": self.scales, "least": self.least, "factors": self.factors}
        found: dict[str, NDArray[Any]] = {"numbers": packed}
        found |= {name: _by_block(x, missing) for name, x in others.items() if x is not None}
        return found if self.order is None else {**found, "order": self.order}


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """What the configuration of a folder says of a module with packed weights.

    Several layers with the same input may be one module, with their rows one after the other.
    """

    name: str  # the format's name in messages
    format: LowBitFormat
    shape: tuple[int, int]  # (rows, size)
    bias: bool = False
    # Numbers of rows by the names of the layers that are one module; empty for one layer.
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Data types and shapes of the tensors of a packed weight, by name."""
        (rows, size), kind = self.shape, self.format
        blocks, groups = -(-rows // BLOCK_ROWS), size // GROUP
        numbers = blocks, groups, kind.lines, BLOCK_ROWS * LINE
        found = {
            "numbers": ("uint8", numbers),
            "scales": (kind.scale_dtype, (blocks, groups * kind.scales, BLOCK_ROWS)),
        }
        if kind.has_least:
            found["least"] = kind.scale_dtype, (blocks, groups, BLOCK_ROWS)
        if kind.factors:
            found["factors"] = "float16", (blocks, size // SHARING * kind.factors, BLOCK_ROWS)
        return found

    def document(self) -> dict[str, Any]:
        """Return the form that `of` reads."""
        return asdict(self) | {"format": self.format._asdict(), "shape": list(self.shape)}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> dict[str, StoredWeight]:
        """Read the modules of a folder's `quantization_config`; none if another method made it.

        Raises a CheckpointError if they have fields that this version does not know.
        """
        if settings.get("quant_method") != METHOD:
            return {}
        try:
            return {
                module: cls(
                    **stored
                    | {"format": LowBitFormat(**stored["format"]), "shape": tuple(stored["shape"])}
                )
                for module, stored in settings["modules"].items()
            }
        except TypeError as error:
            raise CheckpointError(
                "its weights were packed by another version of treeflash; give the GGUF file that "
                "they are from as target, or pack them again"
            ) from error


def lines_of_byte(bits: int) -> int:
    """Return how many lines have their bits above the lower 4 in one byte."""
    return 8 // (bits - 4)


def join(weights: list[LowBitWeight]) -> LowBitWeight | None:
    """Return one weight with the rows of all, None if their formats or inputs' orders differ."""
    kinds = {(x.format, None if x.order is None else x.order.tobytes()) for x in weights}
    if len(kinds) > 1:
        return None
    numbers, scales, least, bits, factors, orders = zip(*weights, strict=True)

    def whole(parts: Sequence[Any]) -> Any:
        return None if parts[0] is None else np.concatenate(parts)

    joined = whole(numbers), whole(scales), whole(least)
    return LowBitWeight(*joined, bits[0], whole(factors), orders[0])


def low_bits(
    data: NDArray[Any], kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> LowBitWeight | None:
    """Return the `LowBitWeight` of a GGUF tensor; None for types and sizes that are not packed."""
    rows, size = shape
    if kind not in TYPES or size % GROUP:
        return None
    bits, read = TYPES[kind]
    _, nbytes = GGML_QUANT_SIZES[kind]
    found = read(np.asarray(data).reshape(-1, nbytes))
    parts: list[Any] = [None if x is None else x.reshape(rows, -1) for x in found]
    numbers, scales, least, factors = parts
    return LowBitWeight(numbers, scales, least, bits, factors)


def round_weight(weight: NDArray[np.float32], bits: int) -> LowBitWeight:
    """Round a weight as GGUF's Q4_1 or Q8_0 does."""
    kind = {4: GGMLQuantizationType.Q4_1, 8: GGMLQuantizationType.Q8_0}[bits]
    rounded = low_bits(quantize(weight, kind), kind, weight.shape)
    assert rounded is not None
    return rounded


def _by_block(scales: NDArray[Any], missing: int) -> NDArray[Any]:
    """Return (blocks, scales of a row, 16) from (rows, scales of a row)."""
    filled = np.pad(scales, ((0, missing), (0, 0)))
    return np.ascontiguousarray(filled.reshape(-1, BLOCK_ROWS, scales.shape[1]).transpose(0, 2, 1))


# Each function below reads the (n, bytes) blocks of types; see `Parts`.


def _float16(blocks: Numbers, first: int) -> NDArray[np.float16]:
    """Return the (n, 1) float16 at a byte of each block."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16)


def _halves(codes: Numbers) -> Numbers:
    """Return the lower halves of bytes, and then the upper ones."""
    return np.concatenate([codes & 15, codes >> 4], -1)


def _q4(blocks: Numbers, has_least: bool) -> Parts:
    first = 4 if has_least else 2
    least = _float16(blocks, 2) if has_least else None
    return Parts(_halves(blocks[:, first:]), _float16(blocks, 0), least)


def _q5(blocks: Numbers, has_least: bool) -> Parts:
    first = 4 if has_least else 2
    high = np.unpackbits(blocks[:, first : first + 4], axis=1, bitorder="little")
    numbers = _halves(blocks[:, first + 4 :]) | high << np.uint8(4)
    least = _float16(blocks, 2) if has_least else None
    return Parts(numbers, _float16(blocks, 0), least)


def _q8(blocks: Numbers) -> Parts:
    return Parts(blocks[:, 2:] ^ np.uint8(128), _float16(blocks, 0))


def _q4_k(blocks: Numbers) -> Parts:
    """Read what Q5_K has, too: 6 bits of scales and least numbers, and the lower 4 of numbers."""
    low, middle, high = (blocks[:, first : first + 4] for first in (4, 8, 12))
    scales = np.concatenate([low & 63, (high & 15) | (low >> 2 & 48)], 1)
    least = np.concatenate([middle & 63, (high >> 4) | (middle >> 2 & 48)], 1)
    factors = np.concatenate([_float16(blocks, 0), -_float16(blocks, 2)], 1)
    codes = blocks[:, -SHARING // 2 :].reshape(-1, 4, GROUP)
    numbers = np.stack([codes & 15, codes >> 4], 2).reshape(-1, 8, GROUP)
    return Parts(numbers, scales.view(np.int8), least.view(np.int8), factors)


def _q5_k(blocks: Numbers) -> Parts:
    high = np.stack([blocks[:, 16:48] >> bit & 1 for bit in range(8)], 1)
    lower = _q4_k(blocks)
    return lower._replace(numbers=lower.numbers | high << np.uint8(4))


def _q6_k(blocks: Numbers) -> Parts:
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 32)
    quarters = [
        (low[:, :, part % 2] >> 4 * (part // 2) & 15) | (high >> 2 * part & 3) << 4
        for part in range(4)
    ]
    scales = blocks[:, 192:208].view(np.int8)
    return Parts(np.stack(quarters, 2), scales, factors=_float16(blocks, 208))


def _from_table(codes: Numbers) -> Numbers:
    """Return the numbers of IQ4's table for 4 bits each."""
    return (np.array(IQ4_TABLE) + 128).astype(np.uint8)[codes]


def _iq4_nl(blocks: Numbers) -> Parts:
    return Parts(_from_table(_halves(blocks[:, 2:])), _float16(blocks, 0))


def _iq4_xs(blocks: Numbers) -> Parts:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2)
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], 2).reshape(-1, 8)
    scales = (low | (high & 3) << 4).astype(np.int8) - np.int8(32)
    numbers = _from_table(_halves(blocks[:, 8:].reshape(-1, 8, 16)))
    return Parts(numbers, scales, factors=_float16(blocks, 0))


_Type = GGMLQuantizationType
TYPES: Mapping[GGMLQuantizationType, tuple[int, Callable[[Numbers], Parts]]] = {
    _Type.Q4_0: (4, lambda blocks: _q4(blocks, has_least=False)),
    _Type.Q4_1: (4, lambda blocks: _q4(blocks, has_least=True)),
    _Type.Q5_0: (5, lambda blocks: _q5(blocks, has_least=False)),
    _Type.Q5_1: (5, lambda blocks: _q5(blocks, has_least=True)),
    _Type.Q8_0: (8, _q8),
    _Type.Q4_K: (4, _q4_k),
    _Type.Q5_K: (5, _q5_k),
    _Type.Q6_K: (6, _q6_k),
    _Type.IQ4_NL: (8, _iq4_nl),
    _Type.IQ4_XS: (8, _iq4_xs),
}
"""Bits of a stored number, and the function that reads blocks, by GGUF's type."""
