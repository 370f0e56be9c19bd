"""The options of the Python API, and the configuration that they give."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from numbers import Integral
from typing import Any, TypedDict

from treeflash.config import Budget, DecodeConfig, HeadRows, Method, Penalties, SamplingConfig
from treeflash.errors import ConfigError


class Options(TypedDict, total=False):
    """Keywords of `generate`, `stream` and `generate_many` of a `LanguageModel`.

    See `DecodeConfig` and `SamplingConfig` for most of them and their defaults. Two defaults
    depend on the models:

    - `method`: the best that the loaded drafter supports: `treeflash`, else `ddtree`, else `ar`;
    - `stop_token_ids`: the end tokens of the target.

    The others:

    - `repetition_penalty`, `presence_penalty`, `frequency_penalty`: see `Penalties`;
    - `logit_bias`: what to add to the logits of tokens, by token id;
    - `stop`: strings to stop at; the text ends before the first of them;
    - `system`: a system message to put before the prompt;
    - `raw`: send a text as it is, without the chat template;
    - `template_args`: extra variables for the chat template. If it has the variable
      `enable_thinking`, that is by default as in the drafter's training: False for all but few
      (`treeflash/hub/published.py`).
    """

    method: Method
    budget: Budget
    top_m: int
    top_k_children: int
    head_vocab: int | None
    head_rows: HeadRows
    draft_temperature: float
    max_tokens: int
    stop_token_ids: Collection[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    log_probs: int | None
    stop: str | Sequence[str]
    system: str | None
    raw: bool
    template_args: Mapping[str, Any] | None


def parse_options(options: Options) -> DecodeConfig:
    """Check options before anything is loaded.

    Raises:
        ConfigError: an option is unknown or invalid.
    """
    if unknown := sorted(options.keys() - Options.__annotations__.keys()):
        raise ConfigError(
            f"unknown option {unknown[0]!r}; options are {', '.join(Options.__annotations__)}"
        )
    stop = options.get("stop", ())
    if not isinstance(stop, Sequence) or not all(isinstance(text, str) for text in stop):
        raise ConfigError(f"stop must be a string or a list of strings, got {stop!r}")
    if "" in ((stop,) if isinstance(stop, str) else stop):
        raise ConfigError("a stop string is empty; leave it out")
    _check_kinds(options)
    given = {key: value for key, value in options.items() if key != "stop_token_ids"}
    return DecodeConfig(
        **_pick(given, DecodeConfig),
        sampling=SamplingConfig(**_pick(given, SamplingConfig)),
        penalties=_penalties(options),
    )


def stop_strings(options: Options) -> tuple[str, ...]:
    """The strings to stop at."""
    stop = options.get("stop", ())
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _penalties(options: Options) -> Penalties:
    names = ("repetition", "presence", "frequency")
    given: dict[str, Any] = dict(options)
    own = {name: given[key] for name in names if (key := f"{name}_penalty") in given}
    biases = options.get("logit_bias", {})
    return Penalties(**own, logit_bias=tuple(sorted(biases.items())))


def _check_kinds(options: Options) -> None:
    """Check the options that no configuration checks."""
    stop_token_ids = options.get("stop_token_ids", ())
    if not isinstance(stop_token_ids, Collection) or not all(
        isinstance(token_id, Integral) for token_id in stop_token_ids
    ):
        raise ConfigError(f"stop_token_ids must be token ids, got {stop_token_ids!r}")
    logit_bias = options.get("logit_bias", {})
    if not isinstance(logit_bias, Mapping) or not all(
        isinstance(token_id, Integral) for token_id in logit_bias
    ):
        raise ConfigError(
            f"logit_bias must be a mapping of token ids to numbers, got {logit_bias!r}"
        )
    system = options.get("system")
    if not isinstance(system, str | None):
        raise ConfigError(f"system must be a string, got {system!r}")
    template_args = options.get("template_args")
    if not isinstance(template_args, Mapping | None):
        raise ConfigError(
            f"template_args must be a mapping of names to values, got {template_args!r}"
        )


def _pick(options: Mapping[str, object], kind: type) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {key: value for key, value in options.items() if key in names}
