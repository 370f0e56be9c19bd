"""The options of the Python API, and the configuration that they give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from numbers import Integral
from types import UnionType
from typing import Any, TypedDict, TypeVar

from treeflash.config import Budget, DecodeConfig, HeadRows, Method, Penalties, SamplingConfig
from treeflash.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])


FORMS = {"json_schema", "regex", "grammar"}
"""The options that set the form of a text."""


class Options(TypedDict, total=False):
    """Options of `generate`, `stream` and `generate_many`, all of which are keywords.

    Decoding:
        method (str): `ar` decodes without drafting; `dflash` drafts a chain and `ddtree` a tree of
            the drafter's marginals; `treeflash-chain` and `treeflash` draft with its AR head;
            `suffix` needs no drafter and copies what followed the last tokens earlier in the text.
            Default: the best that the drafter supports, `treeflash` or `ddtree`; without a known
            drafter `suffix`.
        budget (int or "auto"): nodes of a draft tree with its root, at most 1024; `auto` chooses
            the fastest size in every iteration. Default: "auto".
        top_m (int): previous-token candidates per depth. Default: 16.
        top_k_children (int): children per previous token. Default: 16.
        head_vocab (int or None): number of tokens that the AR head scores, the most probable of a
            block; None is the whole vocabulary. Default: 1024.
        head_rows (int, None or "auto"): number of previous tokens that the AR head conditions on;
            None is all, `auto` follows the budget. Default: "auto".
        suffix (bool): whether the trees of `treeflash` and `ddtree` also copy what followed the
            last tokens earlier in the text. Default: True.
        draft_depths (int or None): depths to draft at most, None for all; each costs MTP and
            EAGLE-3 heads a pass. Default: None.
        draft_temperature (float): temperature of the drafter; it shapes trees, never the text.
            Default: 1.0.
        calibration (bool): adapt the trees to how sharp the drafter's distributions proved to be
            in the text so far; False builds them as published. Default: True.
    Length:
        max_tokens (int): maximum number of new tokens. Default: 256.
        stop (str or list of str): the text ends before the first of these strings. Default: none.
        stop_token_ids (list of int): the text ends with the first of these tokens. Default: the
            end tokens of the target.
    Sampling:
        temperature (float): sampling temperature; 0 is greedy. Default: 0.0.
        top_k (int): sample from the `top_k` most probable tokens; 0 is all. Default: 0.
        top_p (float): sample from the most probable tokens whose probabilities add up to `top_p`.
            Default: 1.0.
        min_p (float): drop tokens less probable than `min_p` times the most probable one.
            Default: 0.0.
        seed (int): random seed for sampling. Default: 0.
        repetition_penalty (float): makes tokens of the prompt and the text less probable if above
            1. Default: 1.0.
        presence_penalty (float): subtracted from the logits of tokens in the text. Default: 0.0.
        frequency_penalty (float): subtracted from a token's logit for each time that it is in the
            text. Default: 0.0.
        logit_bias (dict of int to float): numbers to add to logits, by token id. Default: {}.
        log_probs (int or None): report the log probability of each new token and of this number of
            most probable tokens. Default: None.
    Form, of which at most one option can be set; they need llguidance:
        json_schema (dict or bool): the text is JSON that conforms to this schema.
        regex (str): the whole text matches this regular expression.
        grammar (str): the text belongs to this grammar, in the Lark format of llguidance or in
            llama.cpp's GBNF.
    Prompt:
        system (str or None): a system message to put before the prompt. Default: None.
        raw (bool): encode a string as it is, without the chat template. Default: False.
        template_args (dict or None): extra variables for the chat template. `enable_thinking` is by
            default as in the drafter's training, False for all but few drafters. Default: None.
    """

    method: Method
    budget: Budget
    top_m: int
    top_k_children: int
    head_vocab: int | None
    head_rows: HeadRows
    suffix: bool
    draft_depths: int | None
    draft_temperature: float
    calibration: bool
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
    json_schema: Mapping[str, Any] | bool
    regex: str
    grammar: str
    stop: str | Sequence[str]
    system: str | None
    raw: bool
    template_args: Mapping[str, Any] | None


def lists_options(method: Function) -> Function:
    """A decorator that appends the list of options to a docstring."""
    method.__doc__ = "\n\n".join(map(inspect.cleandoc, (str(method.__doc__), str(Options.__doc__))))
    return method


def parse_options(options: Options) -> DecodeConfig:
    """Make a configuration of options; an unknown or invalid one raises a ConfigError."""
    if unknown := sorted(options.keys() - Options.__annotations__.keys()):
        raise ConfigError(
            f"unknown option {unknown[0]!r}; options are {', '.join(Options.__annotations__)}"
        )
    _check_types(options)
    if "" in stop_strings(options):
        raise ConfigError("a stop string is empty; remove it")
    if len(forms := FORMS & options.keys()) > 1:
        raise ConfigError(f"{' and '.join(sorted(forms))} exclude each other; remove all but one")
    if options.get("raw") and (options.get("system") is not None or options.get("template_args")):
        raise ConfigError(
            "a raw prompt does not use the chat template; remove either raw, or the system message "
            "and the template arguments"
        )
    names = ("repetition", "presence", "frequency")
    values: dict[str, Any] = dict(options)
    values.pop("stop_token_ids", None)
    penalties = {name: values[key] for name in names if (key := f"{name}_penalty") in values}
    biases = options.get("logit_bias", {})
    return DecodeConfig(
        **_pick(values, DecodeConfig),
        sampling=SamplingConfig(**_pick(values, SamplingConfig)),
        penalties=Penalties(**penalties, logit_bias=tuple(sorted(biases.items()))),
    )


def stop_strings(options: Options) -> tuple[str, ...]:
    """The strings to stop at."""
    stop = options.get("stop", ())
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _check_types(options: Options) -> None:
    """Raise a ConfigError for a wrong type that no configuration would notice."""
    values: dict[str, Any] = dict(options)

    def require(name: str, default: object, kinds: type | UnionType, expected: str) -> None:
        value = values.get(name, default)
        items = value if name in ("stop", "stop_token_ids", "logit_bias") else ()
        kind = str if name == "stop" else Integral
        if not isinstance(value, kinds) or not all(isinstance(item, kind) for item in items):
            raise ConfigError(f"{name} must be {expected}, got {value!r}")

    require("stop", (), Sequence, "a string or a list of strings")
    require("stop_token_ids", (), Collection, "token ids")
    require("logit_bias", {}, Mapping, "a mapping of token ids to numbers")
    require("json_schema", {}, Mapping | bool, "a JSON schema")
    require("regex", "", str, "a string")
    require("grammar", "", str, "a string")
    require("system", None, str | None, "a string")
    require("template_args", None, Mapping | None, "a mapping of names to values")


def _pick(options: Mapping[str, object], kind: type) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {key: value for key, value in options.items() if key in names}
