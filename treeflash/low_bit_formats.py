"""Checkpoints whose linear layers have few bits: GPTQ, AWQ, compressed-tensors and MLX.

Each of these formats stores a layer as several tensors, in an order of its own. `find_format` reads
what a configuration says, `LowBitTensors` finds the layers among a folder's tensors, and a format's
reader makes a `LowBitWeight` of a layer: numbers in the order of rows, and for each group a scale,
and a least number where zero is not the middle number. The weights stay bit for bit the ones that
the format defines, computed in float32.

Groups of 64 or 128 numbers, or of a whole row, are several groups of 32 with equal scales. GPTQ and
compressed-tensors may put any inputs into a group: then a layer's inputs are reordered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.errors import UnsupportedModelError
from treeflash.low_bits import GROUP, METHOD, LowBitWeight, Numbers, Scales

Settings: TypeAlias = Mapping[str, Any]
"""What a configuration says of quantised weights, or of a layer's."""
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Tensors: TypeAlias = Mapping[str, NDArray[Any]]
"""A layer's tensors by the ends of their names; bfloat16 numbers as float32."""

PACKED_BITS = 4, 8
"""Bits of numbers that are read."""
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The places in a word of eight neighbouring columns' numbers."""

MALFORMED = (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError)
"""What settings of other types, without a necessary one, or tensors of other shapes raise."""
NOT_VALID = "what its config.json says of its quantised weights is not valid"


class Sizes(NamedTuple):
    """What the shapes of a layer's tensors tell of its weight."""

    rows: int
    size: int  # numbers of a row
    groups: int  # groups of a row
    bits: int  # bits of a number

    @property
    def refusal(self) -> str | None:
        """Why such a weight is not read; None if it is."""
        if self.bits not in PACKED_BITS:
            return f"it has numbers of {self.bits} bits"
        if self.size % (self.groups * GROUP):
            return f"it has groups of {self.size / self.groups:g} numbers"
        return None


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How a library stores the linear layers that it has quantised."""

    name: str  # name in messages
    tensors: tuple[str, ...]  # ends of the names of a layer's tensors; all have the first one
    optional: tuple[str, ...] = ()  # tensors that a layer may have besides
    refusal: Callable[[Settings], str | None] = lambda settings: None
    sizes: Callable[[Shapes, Settings], Sizes]
    read: Callable[[Tensors, Settings, Sizes], LowBitWeight]


@dataclass(frozen=True, eq=False)
class LowBitTensors:
    """The layers of a folder that are stored in a format."""

    format: WeightFormat
    settings: Settings
    layers: Mapping[str, Sizes]  # sizes of layers by name

    @classmethod
    def find(cls, config: Mapping[str, Any], shapes: Shapes) -> LowBitTensors | str | None:
        """Find the layers among a folder's tensors; none in other formats.

        Returns a clause that says why, if the folder's weights are not read.
        """
        found = find_format(config)
        if found is None or isinstance(found, str):
            return found
        kind, settings = found
        layers = {}
        for name in shapes:
            layer, _, end = name.rpartition(".")
            own = {x: shapes.get(f"{layer}.{x}") for x in kind.tensors}
            if end == kind.tensors[0] and None not in own.values():
                parts = {x: shape for x, shape in own.items() if shape is not None}
                try:
                    sizes = kind.sizes(parts, _settings_of(layer, settings))
                    refusal = sizes.refusal
                except MALFORMED:
                    refusal = "its settings or the shapes of its tensors are not valid"
                if refusal is not None:
                    return f"{layer} is not read as {kind.name}, because {refusal}"
                layers[layer] = sizes
        return cls(kind, settings, layers)

    def label(self, layer: str) -> str:
        """Return a layer's format for reports."""
        return f"{self.format.name}, {self.layers[layer].bits} bits"

    def owns(self, name: str) -> bool:
        """Return whether a tensor belongs to one of these layers, and is no bias of it."""
        layer, _, end = name.rpartition(".")
        return layer in self.layers and end in (*self.format.tensors, *self.format.optional)

    def read(
        self, layer: str, names: Collection[str], tensor: Callable[[str], NDArray[Any]]
    ) -> LowBitWeight:
        """Read a layer's weight.

        `names` are the folder's tensors, and `tensor` reads one. An UnsupportedModelError is raised
        for groups of different sizes, and one of `MALFORMED` where tensors do not fit each other.
        """
        ends = self.format.tensors + self.format.optional
        tensors = {x: tensor(f"{layer}.{x}") for x in ends if f"{layer}.{x}" in names}
        sizes = self.layers[layer]
        weight = self.format.read(tensors, _settings_of(layer, self.settings), sizes)
        if weight.numbers.shape != (sizes.rows, sizes.size):
            raise ValueError(f"{weight.numbers.shape} numbers of a weight of {sizes[:2]}")
        return weight


def find_format(config: Mapping[str, Any]) -> tuple[WeightFormat, Settings] | str | None:
    """Return the format of a configuration's weights, and what it says of them.

    None for weights that are plain, or that treeflash has packed; a clause if they are not read.
    """
    settings = config.get("quantization_config") or config.get("quantization")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        return NOT_VALID
    method = settings.get("quant_method", "mlx" if "quantization" in config else None)
    if method == METHOD:
        return None
    if method == COMPRESSED:
        method = settings.get("format")
    if (kind := FORMATS.get(str(method))) is None:
        return "its weights are quantised"
    try:
        reason = kind.refusal(settings)
    except MALFORMED:
        return NOT_VALID
    return (kind, settings) if reason is None else f"its weights are quantised as {reason}"


def _settings_of(layer: str, settings: Settings) -> Settings:
    """Return what a configuration says of a layer, which MLX may give settings of its own."""
    own = settings.get(layer)
    return own if isinstance(own, Mapping) else settings


def _unpack(words: NDArray[Any], bits: int) -> Numbers:
    """Return the (n, m) numbers in (n, words) of 32 bits, which begin with the lowest one."""
    stored = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stored
    return np.stack([stored & 15, stored >> 4], -1).reshape(len(stored), -1)


def _weight(
    numbers: Numbers,
    scales: Scales,  # (rows, groups)
    bits: int,
    *,
    zeros: NDArray[Any] | None = None,  # (rows, groups) numbers that stand for zero
    least: Scales | None = None,  # (rows, groups)
    order: NDArray[np.int64] | None = None,
) -> LowBitWeight:
    """Return a weight with scales for groups of 32 numbers.

    Scales become float16 where that changes none of them.
    """
    rows, size = numbers.shape
    others = [part for part in (zeros, least) if part is not None]
    if len(scales) != rows or any(part.shape != scales.shape for part in others):
        raise ValueError(f"{scales.shape} scales of {numbers.shape} numbers")
    scales = scales.astype(np.float32)
    if zeros is not None and (zeros != 1 << (bits - 1)).any():
        least = -(scales * zeros.astype(np.float32))  # exact: both have few bits
    repeats = size // scales.shape[1] // GROUP
    parts = [scales] if least is None else [scales, least.astype(np.float32)]
    with np.errstate(over="ignore"):
        halves = [part.astype(np.float16) for part in parts]
    stored: list[Scales] = [*parts]
    if all(np.array_equal(x.astype(np.float32), y) for x, y in zip(halves, parts, strict=True)):
        stored = [*halves]
    scales, *lows = (part.repeat(repeats, 1) for part in stored)
    return LowBitWeight(numbers, scales, lows[0] if lows else None, bits, order=order)


def _in_groups(
    numbers: Numbers, groups: NDArray[Any] | None, sizes: Sizes
) -> tuple[Numbers, NDArray[np.int64] | None]:
    """Order numbers by the groups of their inputs, which may be in any order.

    Returns the numbers and `LowBitWeight.order`.
    """
    of_place = np.arange(sizes.size) // (sizes.size // sizes.groups)
    if groups is None or np.array_equal(groups, of_place):
        return numbers, None
    order = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[order], of_place):
        raise UnsupportedModelError(
            "the weights have groups of different sizes, which treeflash does not read; pass "
            "another checkpoint"
        )
    return numbers.take(order, 1), order


# GPTQ: eight or four numbers of a column in a word; zeros are one less than stored in version 1.


def _refuse_gptq(settings: Settings) -> str | None:
    kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if kind not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        return f"GPTQ's {kind}"
    return None


def _gptq_sizes(shapes: Shapes, settings: Settings) -> Sizes:
    (words, rows), (groups, zeros) = shapes["qweight"], shapes["qzeros"]
    bits = 32 * zeros // rows
    return Sizes(rows, words * 32 // max(bits, 1), groups, bits)


def _gptq(tensors: Tensors, settings: Settings, sizes: Sizes) -> LowBitWeight:
    numbers = _unpack(tensors["qweight"].T, sizes.bits)
    numbers, order = _in_groups(numbers, tensors.get("g_idx"), sizes)
    kind = settings.get("checkpoint_format") or settings.get("format")
    zeros = _unpack(tensors["qzeros"], sizes.bits).T.astype(np.int32) + (kind != "gptq_v2")
    return _weight(numbers, tensors["scales"].T, sizes.bits, zeros=zeros, order=order)


# AWQ: eight columns of a row in a word.


def _refuse_awq(settings: Settings) -> str | None:
    kind = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if settings.get("bits", 4) != 4:
        return f"AWQ's {settings['bits']} bits"
    return None if kind == "gemm" else f"AWQ's {kind}"


def _awq_sizes(shapes: Shapes, settings: Settings) -> Sizes:
    (size, words), (groups, rows) = shapes["qweight"], shapes["scales"]
    return Sizes(rows, size, groups, 32 * words // rows)


def _awq(tensors: Tensors, settings: Settings, sizes: Sizes) -> LowBitWeight:
    numbers, zeros = (
        _unpack(tensors[x], sizes.bits).reshape(-1, sizes.rows // 8, 8)[..., AWQ_PLACES]
        for x in ("qweight", "qzeros")
    )
    return _weight(
        np.ascontiguousarray(numbers.reshape(sizes.size, -1).T),
        tensors["scales"].T,
        sizes.bits,
        zeros=zeros.reshape(sizes.groups, -1).T,
    )


# compressed-tensors: numbers of a row in words, or a byte each.


def _refuse_compressed(settings: Settings) -> str | None:
    groups = list(settings.get("config_groups", {}).values())
    weights = [group.get("weights") or {} for group in groups]
    inputs = [group.get("input_activations") or {} for group in groups]
    reasons = {
        "numbers that are no integers": any(x.get("type", "int") != "int" for x in weights),
        "numbers of different sizes": len({x.get("num_bits") for x in weights}) != 1,
        "several formats": any(x.get("format") not in (None, settings["format"]) for x in groups),
        "outputs of fewer bits": any(group.get("output_activations") for group in groups),
        "inputs of stored scales": any(x.get("dynamic") is not True for x in inputs if x),
        "keys of fewer bits": bool(settings.get("kv_cache_scheme")),
        "a rotation of its layers": bool(settings.get("transform_config")),
        "sparse weights": (settings.get("sparsity_config") or {}).get("format", "dense") != "dense",
        "floats": settings.get("quantization_status", "compressed") != "compressed",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _compressed_bits(settings: Settings) -> int:
    return int(next(iter(settings["config_groups"].values()))["weights"]["num_bits"])


def _packed_sizes(shapes: Shapes, settings: Settings) -> Sizes:
    bits, (rows, words) = _compressed_bits(settings), shapes["weight_packed"]
    return Sizes(rows, words * 32 // bits, _last(shapes["weight_scale"]), bits)


def _packed(tensors: Tensors, settings: Settings, sizes: Sizes) -> LowBitWeight:
    numbers = _unpack(tensors["weight_packed"], sizes.bits)
    numbers, order = _in_groups(numbers, tensors.get("weight_g_idx"), sizes)
    zeros = tensors.get("weight_zero_point")
    return _weight(
        numbers,
        tensors["weight_scale"].reshape(-1, sizes.groups),
        sizes.bits,
        zeros=None if zeros is None else _unpack(zeros.T, sizes.bits).T[: sizes.rows],
        order=order,
    )


def _bytes_sizes(shapes: Shapes, settings: Settings) -> Sizes:
    rows, size = shapes["weight"]
    return Sizes(rows, size, _last(shapes["weight_scale"]), 8)


def _bytes(tensors: Tensors, settings: Settings, sizes: Sizes) -> LowBitWeight:
    scales = tensors["weight_scale"].reshape(-1, sizes.groups)
    scales = np.broadcast_to(scales, (sizes.rows, sizes.groups))  # it may be one of all rows
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        zeros = np.broadcast_to(zeros.reshape(-1, sizes.groups) + 128.0, scales.shape)
    numbers = tensors["weight"].view(np.uint8) ^ np.uint8(128)
    return _weight(numbers, scales, sizes.bits, zeros=zeros)


def _last(shape: tuple[int, ...]) -> int:
    return shape[-1] if len(shape) > 1 else 1


# MLX: numbers of a row in words, and a least number for each group.


def _refuse_mlx(settings: Settings) -> str | None:
    layers = [settings, *(x for x in settings.values() if isinstance(x, Mapping))]
    modes = {x.get("mode", "affine") for x in layers} - {"affine"}
    return f"MLX's {modes.pop()}" if modes else None


def _mlx_sizes(shapes: Shapes, settings: Settings) -> Sizes:
    bits, (rows, groups) = int(settings["bits"]), shapes["scales"]
    return Sizes(rows, shapes["weight"][1] * 32 // bits, groups, bits)


def _mlx(tensors: Tensors, settings: Settings, sizes: Sizes) -> LowBitWeight:
    numbers = _unpack(tensors["weight"], sizes.bits)
    return _weight(numbers, tensors["scales"], sizes.bits, least=tensors["biases"])


COMPRESSED, MLX = "compressed-tensors", "MLX"
FORMATS: Mapping[str, WeightFormat] = {
    "gptq": WeightFormat(
        name="GPTQ",
        tensors=("qweight", "qzeros", "scales"),
        optional=("g_idx",),
        refusal=_refuse_gptq,
        sizes=_gptq_sizes,
        read=_gptq,
    ),
    "awq": WeightFormat(
        name="AWQ",
        tensors=("qweight", "qzeros", "scales"),
        refusal=_refuse_awq,
        sizes=_awq_sizes,
        read=_awq,
    ),
    "pack-quantized": WeightFormat(
        name=COMPRESSED,
        tensors=("weight_packed", "weight_scale"),
        optional=("weight_shape", "weight_zero_point", "weight_g_idx"),
        refusal=_refuse_compressed,
        sizes=_packed_sizes,
        read=_packed,
    ),
    "int-quantized": WeightFormat(
        name=COMPRESSED,
        tensors=("weight_scale", "weight"),
        optional=("weight_zero_point",),
        refusal=_refuse_compressed,
        sizes=_bytes_sizes,
        read=_bytes,
    ),
    "mlx": WeightFormat(
        name=MLX,
        tensors=("scales", "biases", "weight"),
        refusal=_refuse_mlx,
        sizes=_mlx_sizes,
        read=_mlx,
    ),
}
"""By `quant_method`; the formats of compressed-tensors by their own name."""
