"""The configuration of a training run."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from treeflash.drafters.formats import HEADS
from treeflash.drafters.loading import drafter_config
from treeflash.errors import ConfigError
from treeflash.option import check, option

HEAD_NAMES = (*(h.training_name for h in HEADS.values() if h.training_name), "none")
LOSSES = ("kl", "ce", "tv", "lk")
"""The names of the losses; docs/training.md defines them."""
POSITION_WEIGHTS = ("exponential", "prefix-product")
NEW_DRAFTERS = ("target", "random")
"""How to initialise a new drafter; any other `init` is the folder of an existing one."""
DEFAULT_LAYERS = 5
MAX_SEED = 2**63 - 1
LOSS_TERM = re.compile(r"(?:(\S+)\s+)?([a-z]+)")
SHAPE = {
    "layers": "num_hidden_layers",
    "block_size": "block_size",
    "target_layer_ids": "target_layer_ids",
    "mask_token_id": "mask_token_id",
}
"""Options that define the shape of a new drafter, and their names in `DrafterConfig`."""


def spelled(name: str) -> str:
    """Write the name of an option as on the command line."""
    return name.replace("_", "-")


def given_options(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """Return the options of a configuration that were given on the command line."""
    given = {item.name: getattr(args, item.name) for item in fields(config) if item.name in args}
    return {k: tuple(value) if isinstance(value, list) else value for k, value in given.items()}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The drafter, its loss, its optimiser, and how often to validate and save.

    Each option has its description beside it; the command line shows it too.
    """

    init: str = option(
        "target",
        "`target` copies the target's last layers, `random` starts from random weights, and the "
        "folder of a DFlash or TreeFlash drafter continues from it and keeps its shape",
    )
    layers: int | None = option(
        None,
        f"number of drafter layers: {DEFAULT_LAYERS} by default, or as many as the drafter in "
        "`init` has; additional layers are appended to it and change nothing at first",
        1,
    )
    block_size: int = option(
        16,
        "tokens per block: the last token so far, and the tokens drafted after it",
        2,
        shown="16, or that of the drafter in `init`",
    )
    head: str = option(
        "swiglu",
        "conditional head: TreeFlash's swiglu or linear, DSpark's markov, DFlash2's selector, or "
        "none",
        shown="swiglu, or that of the drafter in `init`",
    )
    head_size: int | None = option(
        None,
        "inner size of swiglu, by default the inner size of the target's MLP; or rank of markov "
        "and selector, by default 256",
        1,
    )
    target_layer_ids: tuple[int, ...] | None = option(
        None,
        "target layers whose outputs the drafter reads; by default as many as the drafter has "
        "layers, the last one just below the copied layers",
        accepts=lambda ids: ids is None or min(ids, default=-1) >= 0,
        rule="at least one number, each 0 or more",
        metavar="ID",
    )
    mask_token_id: int | None = option(
        None,
        "token that marks the positions to draft; by default the target's padding or end token",
        0,
    )
    freeze_backbone: bool = option(False, "train only the head")
    freeze_layers: bool = option(
        False, "train only the head and the projection of the target's features (fc)"
    )
    loss: str = option("kl", "kl, ce, tv or lk, or a sum such as '0.1 ce + 0.9 tv'")
    marginal_weight: float = option(
        0.5, "weight of the loss without the head, which ignores the previous token", 0
    )
    corrected_weight: float = option(
        1.0, "weight of the loss with the head, which sees the previous token", 0
    )
    position_weights: str = option(
        "exponential",
        "exponential weights depth d by exp(-(d - 1) / gamma); prefix-product weights it by how "
        "much the accepted length depends on it",
    )
    gamma: float = option(7.0, "decay of the exponential weights, in tokens", above=0)
    on_policy: float = option(
        0.0,
        "share of the blocks that the drafter drafts itself and the target scores, rounded up to a "
        "multiple of 8 blocks",
        0,
        maximum=1,
        rule="from 0 to 1",
    )
    top_tokens: int = option(
        32,
        "number of most probable tokens of the target that losses compare one by one; all other "
        "tokens count as one",
        1,
    )
    negatives: int = option(
        0,
        "estimate the softmax from the target's top tokens and N random tokens; 0 uses the whole "
        "vocabulary",
        0,
    )
    steps: int = option(10_000, "optimiser steps", 1)
    minutes: float | None = option(
        None,
        "stop after this many minutes even if steps remain; the learning rate then decays over "
        "time",
        above=0,
        shown="no limit",
    )
    patience: int | None = option(
        None,
        "stop when the validation loss has not fallen for N validations, and keep the drafter with "
        "the lowest loss",
        1,
        shown="train to the end",
    )
    sequences: int = option(8, "sequences per forward pass and process", 1)
    anchors: int = option(64, "roots per sequence, sampled anew for every forward pass", 1)
    accumulation: int = option(1, "forward passes per optimiser step", 1)
    max_length: int = option(3072, "truncate longer sequences", 4)
    learning_rate: float = option(
        6e-4, "peak learning rate, after warm-up; a cosine decays it to 0", above=0
    )
    warmup: float = option(
        0.04,
        "fraction of the steps used for warm-up",
        accepts=lambda share: 0 <= share < 1,
        rule="at least 0 and below 1",
    )
    weight_decay: float = option(0.01, "weight decay of AdamW", 0)
    clip: float = option(1.0, "maximum gradient norm", above=0)
    seed: int = option(0, "random seed", 0)
    validation_sequences: int = option(32, "responses held out for validation", 0)
    validate_every: int = option(200, "steps between validations", 1)
    save_every: int = option(200, "steps between saves of the training state", 1)
    cache_gb: float = option(
        0.0,
        "GB of disk space for cached features of the target; 0 recomputes them in every epoch",
        0,
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{spelled(item.name)} must be a finite number")
        check(self, spelled)
        if self.seed > MAX_SEED:
            raise ConfigError(f"seed must be below {MAX_SEED + 1}")
        if not self.marginal_weight + self.corrected_weight:
            raise ConfigError("marginal-weight and corrected-weight must not both be 0")
        for name, known in (("head", HEAD_NAMES), ("position_weights", POSITION_WEIGHTS)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(
                    f"unknown {spelled(name)} {value!r}; choose one of {', '.join(known)}"
                )
        parse_loss(self.loss)
        if self.patience is not None and not self.validation_sequences:
            raise ConfigError("patience needs validation; set validation-sequences to 1 or more")
        if self.freeze_layers and (self.freeze_backbone or self.init in NEW_DRAFTERS):
            raise ConfigError(
                "freeze-layers needs the folder of a drafter as init, and cannot be combined with "
                "freeze-backbone"
            )
        if self.freeze_backbone and (self.head == "none" or self.init in NEW_DRAFTERS):
            raise ConfigError(
                "freeze-backbone trains only the head of an existing drafter; "
                "it needs a head, and a folder as init"
            )


def parse_loss(text: str) -> dict[str, float]:
    """Parse the weights of losses in a sum such as `0.1 ce + 0.9 tv`; a ConfigError if invalid."""
    weights: dict[str, float] = {}
    for term in text.split("+"):
        match = LOSS_TERM.fullmatch(term.strip())
        name = match[2] if match else term.strip()
        if match is None or name not in LOSSES:
            raise ConfigError(
                f"unknown loss {name!r}; choose one of {', '.join(LOSSES)}, or a sum such as "
                "'0.1 ce + 0.9 tv'"
            )
        if name in weights:
            raise ConfigError(f"loss {text!r} names {name} twice")
        try:
            weights[name] = float(match[1] or 1)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ConfigError(f"the weight of {name} must be a number above 0, got {match[1]!r}")
    return weights


def make_train_config(options: Mapping[str, Any]) -> TrainConfig:
    """Make a configuration of the options that were given.

    An invalid option raises a ConfigError, and `init` without a drafter a CheckpointError.
    """
    config = TrainConfig(**options)
    if config.init not in NEW_DRAFTERS:
        drafter = drafter_config(Path(config.init))
        for name, attribute in SHAPE.items():
            value, existing = getattr(config, name), getattr(drafter, attribute)
            if name == "layers" and value is not None and value > existing:
                continue  # the missing layers are appended
            if name in options and value != existing:
                raise ConfigError(
                    f"the drafter in {config.init} has {spelled(name)} {existing}, not {value}; "
                    "leave it out"
                )
        if drafter.head is not None and "head" not in options:
            config = replace(config, head=trained_head_name(drafter.head))
    return config


def trained_head_name(head: str | None) -> str:
    """Return the name in `TrainConfig.head` of a head in a drafter's folder."""
    return "none" if head is None else HEADS[head].training_name or head
