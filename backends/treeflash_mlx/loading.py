"""Loads a target by mlx-lm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm import utils

from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash_mlx.config_compatibility import compatible_settings
from treeflash_mlx.hybrid_compatibility import TEXT_TYPES, WEIGHTS


def load_model(folder: Path, config: Mapping[str, Any], dtype: mx.Dtype | None) -> nn.Module:
    """The model of a folder in the Hugging Face format.

    Args:
        folder: with `model*.safetensors`.
        config: the contents of its `config.json`.
        dtype: of all floating-point parameters; None leaves them as they are.

    Raises:
        CheckpointError: it is damaged, or its weights do not fit its configuration.
        UnsupportedModelError: mlx-lm lacks the model type, or orders its layers otherwise.
    """
    if not list(folder.glob("model*.safetensors")):
        raise CheckpointError(f"{folder} has no model*.safetensors; mlx-lm reads no other format")
    try:
        settings = compatible_settings(config)
        if (family := config.get("model_type")) in TEXT_TYPES:
            settings["model_type"] = TEXT_TYPES[family]
        model, _ = utils.load_model(
            folder, lazy=True, model_config=settings, get_model_classes=_classes
        )
        if dtype is not None:
            model.set_dtype(dtype)
        mx.eval(model.parameters())
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error.__cause__, ImportError):
            raise UnsupportedModelError(
                f"mlx-lm has no model type {config.get('model_type')!r}; try --backend cuda"
            ) from error
        # mlx-lm lists missing parameters over many lines.
        reason = shorten(str(error) or type(error).__name__, 300)
        raise CheckpointError(f"mlx-lm cannot load {folder}: {reason}") from error
    return model


def _classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
    """The classes of a model and its arguments; the model's reads weights by all their names."""
    model, arguments = utils._get_classes(config)
    names = WEIGHTS.get(config["model_type"])
    if names is None:
        return model, arguments

    class Renamed(model):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            for theirs, ours in names.items():
                weights = {name.replace(theirs, ours): x for name, x in weights.items()}
            return super().sanitize(weights)

    return Renamed, arguments
