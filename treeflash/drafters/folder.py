"""Read the folder of a model: `config.json` and safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from treeflash.errors import CheckpointError

FLOATS = ("BF16", "F16", "F32", "F64")
INTEGERS = {"d2t": "I64", "t2d": "BOOL", "masked_embedding.token_ordering": "I64"}
"""Types of the tensors that map or order a drafter's vocabulary, by stored name."""
GROUP_SIZES, GROUP_BITS = (32, 64, 128), (2, 3, 4, 5, 6, 8)
"""Numbers of a group, and bits of a number, that MLX quantises to."""


def read_config(
    folder: Path, name: str = "config.json", kind: str = "a model folder"
) -> dict[str, Any]:
    """Read the configuration of a folder; a CheckpointError if it has no JSON object.

    `name` is the file's, and `kind` says in messages what a folder with such a file is.
    """
    path = folder / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {name}; it is not {kind}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return config


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Return whether a model's configuration is of quantised weights, of PyTorch or of MLX."""
    return any(config.get(key) for key in ("quantization", "quantization_config"))


def weight_files(folder: Path) -> list[Path]:
    """List a model folder's safetensors files, sorted; a CheckpointError if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors file; convert its weights")
    return files


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    A weight that MLX has quantised in groups has the shape of its numbers and `bits` for each of
    them; the others have 0.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    bits: int = 0


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return a folder's tensors by stored name, from the headers of its files.

    Raises a CheckpointError if a file is damaged, or there are none.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(name)
                    tensors[name] = StoredTensor(path, part.get_dtype(), tuple(part.get_shape()))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
    return tensors


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A model's folder, whose configuration and headers were read once."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]  # tensors by stored name

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors, sorted."""
        return sorted({tensor.path for tensor in self.tensors.values()})


def open_folder(folder: Path) -> ModelFolder:
    """Read the configuration and the headers of a folder, but no tensor.

    Raises a CheckpointError if it has none, or they are damaged.
    """
    config = read_config(folder)
    if config.get("quantization_config") == config.get("quantization"):  # MLX writes both
        config.pop("quantization_config", None)
    return ModelFolder(folder, config, _quantised_weights(stored_tensors(folder), config))


def mlx_quantisation(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return how MLX has quantised the layer of a tensor; empty if it has quantised none.

    `name` is the tensor's stored name. A layer may have settings of its own.
    """
    settings = config.get("quantization")
    if not isinstance(settings, Mapping):
        return {}
    own = settings.get(name.rpartition(".")[0])
    return own if isinstance(own, Mapping) else settings


def _quantised_weights(
    tensors: dict[str, StoredTensor], config: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Give MLX's quantised weights their shape, in place of the tensors that each consists of.

    A row of numbers is packed into words; every group of them has a scale and a bias.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        base = name.removesuffix(".weight")
        scales, biases = (tensors.get(f"{base}.{part}") for part in ("scales", "biases"))
        if scales is None or biases is None or not _fit(tensor, scales, biases):
            continue
        settings = mlx_quantisation(config, name)
        group, mode = settings.get("group_size"), settings.get("mode", "affine")
        if mode != "affine" or group not in GROUP_SIZES:
            continue
        columns = scales.shape[-1] * group
        bits, rest = divmod(32 * tensor.shape[-1], columns)
        if bits in GROUP_BITS and not rest:
            del found[f"{base}.scales"], found[f"{base}.biases"]
            found[name] = replace(tensor, shape=(*tensor.shape[:-1], columns), bits=bits)
    return found


def _fit(words: StoredTensor, scales: StoredTensor, biases: StoredTensor) -> bool:
    """Return whether there are a scale and a bias for each group of the numbers in some words."""
    parts = scales, biases
    return (
        words.dtype == "U32"
        and all(part.path == words.path and part.dtype in FLOATS for part in parts)
        and all(part.shape[:-1] == words.shape[:-1] for part in parts)
        and scales.shape == biases.shape
        and math.prod(scales.shape) > 0
    )


def read_quantised(
    path: Path, weights: Mapping[str, StoredTensor]
) -> dict[str, NDArray[np.float32]]:
    """Read the numbers of a file's weights that MLX has quantised: scale times integer, plus bias.

    A CheckpointError is raised if the file is damaged.
    """
    parts = _deserialized(path)
    return {name: _dequantised(name, weight, parts) for name, weight in weights.items()}


def _dequantised(
    name: str, weight: StoredTensor, parts: Mapping[str, Mapping[str, Any]]
) -> NDArray[np.float32]:
    rows, base = math.prod(weight.shape[:-1]), name.removesuffix("weight")
    words = np.frombuffer(parts[name]["data"], np.uint8).reshape(rows, -1)
    scales, biases = (
        _numbers("", parts[f"{base}{part}"]).reshape(rows, -1, 1) for part in ("scales", "biases")
    )
    numbers = np.empty((*scales.shape[:2], weight.shape[-1] // scales.shape[1]), np.float32)
    powers = 1 << np.arange(weight.bits)
    for row, packed in enumerate(words):  # a row's integers are a stream of bits, lowest first
        stream = np.unpackbits(packed, bitorder="little").reshape(*numbers.shape[1:], weight.bits)
        numbers[row] = scales[row] * (stream @ powers) + biases[row]
    return numbers.reshape(weight.shape)


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a folder's tensors by name; a CheckpointError if it is damaged."""
    tensors = stored_tensors(folder)
    for name, tensor in tensors.items():
        check_dtype(tensor.path, name, tensor.dtype)
    return {name: tensor.shape for name, tensor in tensors.items()}


def read_tensors(folder: Path) -> dict[str, NDArray[Any]]:
    """Read all tensors of a folder as `read_file` does."""
    tensors: dict[str, NDArray[Any]] = {}
    for path in weight_files(folder):
        tensors |= read_file(path)
    return tensors


def read_file(path: Path, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read a file's tensors as float32, or as in `INTEGERS`; raises what `read_stored` does.

    `names` are the names of the tensors to read; None reads all.
    """
    parts = read_stored(path, names)
    return {name: _numbers(name, part).reshape(part["shape"]) for name, part in parts.items()}


def read_stored(path: Path, names: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """Read `dtype`, `shape` and `data` of a file's tensors; a CheckpointError if damaged."""
    parts = _deserialized(path)
    if names is not None:
        parts = {name: parts[name] for name in names}
    for name, part in parts.items():
        check_dtype(path, name, part["dtype"])
    return parts


def _deserialized(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return dict(safetensors.deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def write_stored(
    path: Path, entries: Mapping[str, tuple[str, Sequence[int], int]], data: Iterable[bytes]
) -> None:
    """Write a safetensors file with one tensor in memory at a time.

    The file has the length of a header, the JSON header, and the data. `entries` has, by name, the
    dtype, shape and number of bytes of a tensor; `data` has the bytes of these tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, nbytes) in entries.items():
        start, end = end, end + nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in data:
            file.write(part)


def check_dtype(path: Path, name: str, dtype: str) -> None:
    """Raise a CheckpointError for a tensor that is quantised or not numbers."""
    if dtype not in FLOATS and dtype != INTEGERS.get(name):
        raise CheckpointError(
            f"{path} holds tensors of type {dtype}; supported are {', '.join(FLOATS)}"
        )


def _numbers(name: str, part: Mapping[str, Any]) -> NDArray[Any]:
    data, dtype = part["data"], part["dtype"]
    if name in INTEGERS:
        return np.frombuffer(data, "?" if dtype == "BOOL" else "<i8")
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, f"<f{int(dtype[1:]) // 8}").astype(np.float32)
