"""The configuration of a training run, from a TOML file and the command line."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from treeflash.drafters.formats import drafter_config
from treeflash.errors import ConfigError
from treeflash.text.prompt_file import read_text
from treeflash.training.loss_mixture import parse_loss

HEADS = ("swiglu", "linear", "markov", "selector", "none")
POSITION_WEIGHTS = ("exponential", "prefix-product")
DEFAULT_LAYERS = 5
NEW = ("target", "random")
"""How to initialise a new drafter; any other `init` is the folder of an existing one."""
SEEDS = 2**63
KINDS: dict[str, tuple[Any, str]] = {
    "str": (str, "a string"),
    "int": (int, "an integer"),
    "int | None": (int, "an integer"),
    "float": (int | float, "a number"),
    "bool": (bool, "true or false"),
    "tuple[int, ...] | None": (tuple, "a list of integers"),
}
"""The types of options in a TOML file, and their names."""
SHAPE = {
    "layers": "num_hidden_layers",
    "block_size": "block_size",
    "target_layer_ids": "target_layer_ids",
    "mask_token_id": "mask_token_id",
}
"""Options that define the shape of a new drafter, and their names in `DrafterConfig`."""
MINIMUM = {
    "layers": 1,
    "block_size": 2,
    "top_tokens": 1,
    "negatives": 0,
    "steps": 1,
    "sequences": 1,
    "anchors": 1,
    "accumulation": 1,
    "max_length": 4,
    "seed": 0,
    "validation_sequences": 0,
    "validate_every": 1,
    "save_every": 1,
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The drafter, its loss, its optimiser, and how often to validate and save.

    Attributes:
        init: where to start: `target` copies the target's last layers, `random` starts from
            random weights, and a folder is a DFlash or TreeFlash checkpoint, whose shape is kept.
        layers: number of drafter layers; None is 5, or as many as the checkpoint has. Layers that
            it lacks are appended and change nothing at first.
        block_size: S, the root and S - 1 masks.
        head: the conditional head, one of `HEADS`: TreeFlash's `swiglu` or `linear`, DSpark's
            `markov`, DFlash2's `selector`, or `none`.
        head_size: inner size of `swiglu`, by default that of the target's MLP; the rank of `markov`
            and `selector`, by default 256.
        target_layer_ids: target layers whose outputs are the context features; None spreads as
            many as the drafter has layers, the last of them just below the copied layers.
        mask_token_id: None is the target's padding or end token.
        freeze_backbone: train only the head.
        loss: a weighted sum of losses such as `0.1 ce + 0.9 tv`; see `parse_loss`.
        marginal_weight: weight of the loss without the previous token.
        corrected_weight: weight of the loss with the previous token, which the AR head adds.
        position_weights: `exponential` gives depth d the weight exp(-(d - 1) / gamma) (DFlash);
            `prefix-product` weights it by how much the accepted length depends on it (D-PACE).
        gamma: of the exponential weights, in tokens.
        on_policy: share of the anchors whose blocks the drafter drafts itself, and the target then
            scores (Draft-OPD); rounded up to a multiple of 8 anchors.
        top_tokens: tokens of the target's distribution that losses compare one by one; the rest
            counts as one more.
        negatives: size of the random sample of the vocabulary that estimates the softmax
            normaliser, beside the target's top tokens in the batch; 0 uses the whole vocabulary.
        steps: optimiser steps.
        sequences: texts per forward pass and process.
        anchors: positions of a text that play the root, drawn anew for every forward pass.
        accumulation: forward passes per step.
        max_length: longer texts are truncated.
        learning_rate: peak learning rate, after warm-up; a cosine decays it to 0.
        warmup: fraction of the steps used for warm-up.
        weight_decay: of AdamW.
        clip: maximum norm of the gradient.
        seed: random seed for everything.
        validation_sequences: responses held out for validation.
        validate_every: steps between validations.
        save_every: steps between states that a run can resume from.
        cache_gb: disk space for cached features of the target; 0 recomputes them in every epoch.
    """

    init: str = "target"
    layers: int | None = None
    block_size: int = 16
    head: str = "swiglu"
    head_size: int | None = None
    target_layer_ids: tuple[int, ...] | None = None
    mask_token_id: int | None = None
    freeze_backbone: bool = False
    loss: str = "kl"
    marginal_weight: float = 0.5
    corrected_weight: float = 1.0
    position_weights: str = "exponential"
    gamma: float = 7.0
    on_policy: float = 0.0
    top_tokens: int = 32
    negatives: int = 0
    steps: int = 10_000
    sequences: int = 8
    anchors: int = 64
    accumulation: int = 1
    max_length: int = 3072
    learning_rate: float = 6e-4
    warmup: float = 0.04
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    validation_sequences: int = 32
    validate_every: int = 200
    save_every: int = 200
    cache_gb: float = 0.0

    def __post_init__(self) -> None:
        for name, minimum in MINIMUM.items():
            if (value := getattr(self, name)) is not None and value < minimum:
                raise ConfigError(f"{_flag(name)} must be {minimum} or more")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{_flag(field.name)} must be a finite number")
        if self.seed >= SEEDS:
            raise ConfigError(f"seed must be below {SEEDS}")
        if not self.marginal_weight + self.corrected_weight:
            raise ConfigError("marginal-weight and corrected-weight must not both be 0")
        if self.head_size is not None and self.head_size < 1:
            raise ConfigError("head-size must be 1 or more")
        for name, known in (("head", HEADS), ("position_weights", POSITION_WEIGHTS)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(
                    f"unknown {_flag(name)} {value!r}; choose one of {', '.join(known)}"
                )
        parse_loss(self.loss)
        for name in ("gamma", "learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{_flag(name)} must be above 0")
        for name in ("marginal_weight", "corrected_weight", "weight_decay", "cache_gb"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{_flag(name)} must be 0 or more")
        if not 0 <= self.on_policy <= 1:
            raise ConfigError("on-policy must be from 0 to 1")
        if not 0 <= self.warmup < 1:
            raise ConfigError("warmup must be at least 0 and below 1")
        if self.freeze_backbone and (self.head == "none" or self.init in NEW):
            raise ConfigError(
                "freeze-backbone trains only the head of a checkpoint; "
                "it needs a head, and a folder as init"
            )


def read_train_config(path: Path | None, changes: Mapping[str, Any]) -> TrainConfig:
    """Read the configuration from a TOML file, overridden by `changes`.

    Raises:
        ConfigError: an option is unknown, has the wrong type, or is out of range.
        CheckpointError: `init` names a folder without a drafter.
        PromptError: the file cannot be read.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
    known = {field.name: str(field.type) for field in fields(TrainConfig)}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown option {name!r}; options are {', '.join(known)}")
        if isinstance(value, list):
            values[name] = value = tuple(value)
        if not _fits(value, known[name]):
            raise ConfigError(f"{path}: {name} must be {KINDS[known[name]][1]}, got {value!r}")
    given = {**values, **changes}
    config = TrainConfig(**given)
    if config.init not in NEW:
        drafter = drafter_config(Path(config.init))
        for name, attribute in SHAPE.items():
            value, own = getattr(config, name), getattr(drafter, attribute)
            if name == "layers" and value is not None and value > own:
                continue  # the missing ones are appended
            if name in given and value != own:
                raise ConfigError(
                    f"the drafter in {config.init} has {_flag(name)} "
                    f"{own}, not {value}; leave it out"
                )
        if drafter.head is not None and "head" not in given:
            config = replace(config, head=trained_head_name(drafter.head))
    return config


def trained_head_name(head: str | None) -> str:
    """The name in `TrainConfig.head` of a head in a checkpoint."""
    return {None: "none", "vanilla": "markov"}.get(head, str(head))


def _fits(value: Any, kind: str) -> bool:
    if isinstance(value, tuple):
        return "tuple" in kind and all(type(part) is int for part in value)
    is_bool = isinstance(value, bool)
    return isinstance(value, KINDS[kind][0]) and (is_bool == (kind == "bool"))


def _flag(name: str) -> str:
    return name.replace("_", "-")
