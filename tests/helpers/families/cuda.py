"""Tiny random models of the model types of transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.utils import logging
from treeflash_cuda.backend import CudaBackend
from treeflash_cuda.target import RECURRENT_LAYERS
from treeflash_cuda.target_loading import load_target

from treeflash.config import LoadConfig

from . import LAYERS, PREFIX, TOKENS, by_name

TYPES = json.loads((Path(__file__).parent / "cuda_types.json").read_text("utf-8"))
SMALL, OVERRIDES = TYPES["fields"], by_name(TYPES["settings"])
SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)


def prepare() -> None:
    """Leave out what transformers says about each model."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def model_types() -> list[str]:
    """Types that `AutoModelForCausalLM` can make."""
    return sorted(
        name for name, kind in CONFIG_MAPPING.items() if kind in MODEL_FOR_CAUSAL_LM_MAPPING
    )


def load(folder: Path) -> CudaBackend:
    """The backend with the target alone, before the checks at load."""
    target = load_target(folder, LoadConfig(device="cpu", dtype="float32"), pack=True)
    return CudaBackend(target, None, None)


def write_for_comparison(folder: Path, name: str) -> Callable[[], NDArray[np.float32]]:
    """Save a model, and return a function that gives transformers' logits."""
    expected = plain_logits(write(folder, name))
    return lambda: expected


def write(folder: Path, name: str, **fields: Any) -> Any:
    """Save a random model of that type, with some other fields; load it as transformers does."""
    config = configuration(name, **fields)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 10_000_000:
        raise ValueError("the settings of this type do not make it small")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:  # sharp attention: a uniform one would hide wrong positions and masks
                sharp = 1.0 if "embed" in path else 1.5 * parameter.shape[-1] ** -0.5
                parameter.normal_(0, sharp)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def configuration(name: str, **changes: Any) -> Any:
    """A small configuration with the kinds of layers that the type's default one has."""
    kind = CONFIG_MAPPING[name]
    small = SMALL | {"layer_types": layer_types(name)} | OVERRIDES.get(name, {}) | changes
    if "text_config" in kind.sub_configs:
        return kind(text_config=small)
    try:
        return kind(**small)
    except Exception:  # the type names its kinds of layers otherwise
        return kind(**{key: value for key, value in small.items() if key != "layer_types"})


def layer_types(name: str) -> list[str]:
    """The kinds of layers of the type's default configuration, by turns."""
    own = getattr(CONFIG_MAPPING[name]().get_text_config(), "layer_types", None) or []
    kinds = list(dict.fromkeys(own))
    if set(kinds) <= set(SLIDING):
        return SLIDING
    return [kinds[i % len(kinds)] for i in range(max(LAYERS, len(kinds)))]


def missing_layers(name: str, config: Any) -> set[str]:
    """Kinds of layers that the type's default configuration has, and this one lacks."""
    return default_layer_kinds(name) - layer_kinds(config)


def default_layer_kinds(name: str) -> set[str]:
    """The kinds in the model of the default configuration; empty if transformers has none."""
    try:
        return layer_kinds(CONFIG_MAPPING[name]())
    except (AttributeError, TypeError):  # a default configuration that makes no model
        return set()


def layer_kinds(config: Any) -> set[str]:
    """The classes of the modules that a configuration makes, and its names for its layers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = getattr(config.get_text_config(), "layer_types", None) or ()
    return {type(module).__name__ for module in model.modules()} | set(names)


def plain_logits(model: Any) -> NDArray[np.float32]:
    """The last token's logits by transformers alone; a recurrent model is given it as in decoding.

    Some of them limit the steps of a prompt's tokens, and not the steps of decoding.
    """
    token_ids = torch.tensor([TOKENS])
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    with torch.inference_mode():
        if RECURRENT_LAYERS.isdisjoint(kinds):
            return model(token_ids).logits[0, -1].numpy()
        before = model(token_ids[:, :-1], use_cache=True)
        names = [name for name in ("cache", "past_key_values", "cache_params") if name in before]
        step = {"position_ids": torch.tensor([[PREFIX - 1]]), names[0]: before[names[0]]}
        return model(token_ids[:, -1:], use_cache=True, **step).logits[0, -1].numpy()
