"""A model's folder: `config.json` and safetensors files, read unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from treeflash.errors import CheckpointError

FLOATS = ("BF16", "F16", "F32", "F64")
INTEGERS = {"d2t": "I64", "t2d": "BOOL"}
"""Tensors that map the tokens of a drafter's own vocabulary, by stored name."""


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder.

    Raises:
        CheckpointError: it is missing or is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json; it is not a model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted.

    Raises:
        CheckpointError: there is none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors file; other formats are not read")
    return files


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a folder's tensors, by name, read from the headers of its files.

    Raises:
        CheckpointError: a file is damaged, or a tensor is not of floating point.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    tensor = file.get_slice(name)
                    check_dtype(path, name, tensor.get_dtype())
                    shapes[name] = tuple(tensor.get_shape())
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
    return shapes


def read_tensors(folder: Path) -> dict[str, NDArray[Any]]:
    """All tensors of a folder as float32, by stored name; raises what `read_file` does."""
    tensors: dict[str, NDArray[Any]] = {}
    for path in weight_files(folder):
        tensors |= read_file(path)
    return tensors


def read_file(path: Path) -> dict[str, NDArray[Any]]:
    """All tensors of a safetensors file as float32, or as in `INTEGERS`, by stored name.

    Raises:
        CheckpointError: the file is damaged, or a tensor is not of floating point.
    """
    try:
        parts = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return {name: _numbers(path, name, part).reshape(part["shape"]) for name, part in parts}


def check_dtype(path: Path, name: str, dtype: str) -> None:
    """Raise a CheckpointError for tensors that are quantised or not numbers."""
    if dtype not in FLOATS and dtype != INTEGERS.get(name):
        raise CheckpointError(f"{path} holds tensors of type {dtype}; floating point is needed")


def _numbers(path: Path, name: str, part: Mapping[str, Any]) -> NDArray[Any]:
    data, dtype = part["data"], part["dtype"]
    check_dtype(path, name, dtype)
    if name in INTEGERS:
        return np.frombuffer(data, "?" if dtype == "BOOL" else "<i8")
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, f"<f{int(dtype[1:]) // 8}").astype(np.float32)
