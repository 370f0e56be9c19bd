"""Tiny random models of the model types of mlx-lm."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import MODEL_REMAPPING
from numpy.typing import NDArray
from transformers import CONFIG_MAPPING
from treeflash_mlx.backend import MlxBackend, runs_batches
from treeflash_mlx.target import CacheLayout, Target, compatible_settings, load_model

from treeflash.drafters.folder import read_config

from . import TOKENS, by_name

TYPES = json.loads((Path(__file__).parent / "mlx_types.json").read_text("utf-8"))
FIELDS = {name: x for names, x in TYPES["fields"].items() for name in names.split()}
OVERRIDES = by_name(TYPES["settings"])
OPTIONAL = TYPES["optional"]
"""Classes that a type's module defines and its checkpoints need not have: for adapters, for models
spread over several devices, for sizes of the type without experts, or never used."""


def prepare() -> None:
    """Compute on the CPU, where float32 is exact."""
    mx.set_default_device(mx.cpu)


def model_types() -> list[str]:
    """The modules of mlx-lm that define a model, and the other names that it has for them."""
    folder = Path(mlx_lm.models.__path__[0])
    modules = {path.stem for path in folder.glob("*.py") if "class Model(" in path.read_text()}
    return sorted(modules | {name for name, of in MODEL_REMAPPING.items() if of in modules})


def load(folder: Path) -> MlxBackend:
    """The backend with the target alone; what it refuses is refused."""
    target = Target(folder, mx.float32, None)
    target.check_drafting()
    target.check_trees()
    backend = MlxBackend(target, None, None)
    target.batches = runs_batches(backend)
    return backend


def write_for_comparison(folder: Path, name: str) -> Callable[[], NDArray[np.float32]]:
    """Save a model, and return a function that gives mlx-lm's logits."""
    write(folder, name)
    return partial(plain_logits, folder)


def write(folder: Path, name: str, **fields: Any) -> None:
    """Save a random model of that type, as mlx-lm would convert it, with some other fields."""
    config = configuration(name, **fields)
    mx.random.seed(1)  # some layers draw their biases when they are made
    model = build(name, config)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    weights = {path: random(rng, path, x) for path, x in tree_flatten(model.parameters())}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def configuration(name: str, **changes: Any) -> dict[str, Any]:
    """Values for the fields of a type's `ModelArgs`, or of the text model inside it."""
    known = inspect.signature(module_of(name).ModelArgs).parameters
    own = OVERRIDES.get(MODEL_REMAPPING.get(name, name), {})
    fields = FIELDS | changes
    if "text_config" in known:
        return {"text_config": {"model_type": f"{name}_text", **fields, **own}, "model_type": name}
    return {**{k: v for k, v in fields.items() if k in known}, **own, "model_type": name}


def missing_layers(name: str, config: dict[str, Any]) -> set[str]:
    """Kinds of layers and caches that a type has and a model of that configuration lacks.

    The type has the layers that its module in mlx-lm defines, and the layers of a model with
    transformers' default configuration, if mlx-lm can build it.
    """
    model = build(name, config)
    text = sys.modules[type(getattr(model, "language_model", model)).__module__]
    defined = {
        kind
        for kind, value in vars(text).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and value.__module__ == text.__name__
    }
    kinds = layer_kinds(model)
    return (defined - {*OPTIONAL.get(name, ())} | default_layer_kinds(name)) - kinds


def default_layer_kinds(name: str) -> set[str]:
    """The kinds in the model of transformers' default configuration; empty if there is none."""
    if name not in CONFIG_MAPPING:
        return set()
    default = CONFIG_MAPPING[name]().to_dict()
    given = {key: value for key, value in default.items() if value is not None}
    # mlx-lm requires some settings that transformers does not have.
    config = {**configuration(name), **given, **compatible_settings(given), "model_type": name}
    try:
        # The weights are lazy: a model of full size costs nothing until it is evaluated.
        return layer_kinds(build(name, config))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return set()  # mlx-lm and transformers configure the type differently


def layer_kinds(model: nn.Module) -> set[str]:
    """The classes of a model's modules and of their caches."""
    modules = {type(module).__name__ for _, module in model.named_modules()}
    return modules | {type(cache).__name__ for cache in make_prompt_cache(model)}


def build(name: str, config: dict[str, Any]) -> nn.Module:
    """The model that mlx-lm makes of a configuration."""
    module = module_of(name)
    return module.Model(module.ModelArgs.from_dict(config))


def module_of(name: str) -> Any:
    """The module of mlx-lm that runs a type."""
    return importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(name, name)}")


def plain_logits(folder: Path) -> NDArray[np.float32]:
    """The last token's logits by mlx-lm alone; a recurrent model is given it as in decoding.

    Some of them limit the steps of a prompt's tokens, and not the steps of decoding. Other models
    get the text in one pass: the ring buffer of PLaMo 3 is one position shorter than its window.
    """
    model = load_model(folder, read_config(folder), mx.float32)
    token_ids, cache = mx.array([TOKENS]), make_prompt_cache(model)
    if CacheLayout("", cache).state_counts:
        model(token_ids[:, :-1], cache=cache)
        token_ids = token_ids[:, -1:]
    return np.array(model(token_ids, cache=cache)[0, -1])


def random(rng: np.random.Generator, path: str, x: mx.array) -> mx.array:
    """Values that make attention sharp and decays slow.

    Uniform attention would hide wrong positions and masks, fast decays wrong states.
    """
    if not mx.issubdtype(x.dtype, mx.floating):
        return x
    if path.endswith("A_log"):
        return mx.array(rng.uniform(-3, 0, x.shape), x.dtype)
    if x.ndim < 2:
        return x + mx.array(rng.normal(0, 0.1, x.shape), x.dtype)
    scale = 1.0 if "embed" in path or "wte" in path else 1.5 / np.sqrt(x.shape[-1])
    return mx.array(rng.normal(0, scale, x.shape), x.dtype)
