"""The options of the Python API, and the configuration that they give."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from treeflash.config import Budget, DecodeConfig, HeadRows, Method, Penalties, SamplingConfig
from treeflash.errors import ConfigError, PromptError
from treeflash.option import Option, check, did_you_mean, option, options_of, parse_json_object
from treeflash.text.input_file import read_text
from treeflash.text.tokenizer import check_template_args, check_unicode

Function = TypeVar("Function", bound=Callable[..., Any])
MAX_IMAGES = 16
"""Most images of a prompt, unless the user sets another limit."""
GRAMMAR_OPTIONS = ("grammar", "json_schema", "regex")
"""The options that set the form of a text. At most one can be set; they need llguidance."""


def _parse_grammar(text: str) -> str:
    """Read a text, or the content of the file whose name follows an `@`."""
    if not text.startswith("@"):
        return text
    try:
        return read_text(Path(text[1:]))
    except PromptError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parse_json_schema(text: str) -> dict[str, Any]:
    return parse_json_object(_parse_grammar(text))


def _are_strings(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(item, str) for item in value)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Everything that determines a text except its prompt and its models: the parsed options.

    `decode` says how the text is decoded.
    """

    decode: DecodeConfig = field(default_factory=DecodeConfig)
    json_schema: Mapping[str, Any] | bool | None = option(
        None,
        "write JSON that conforms to this JSON schema, whose objects have no other keys than their "
        "properties unless it has additionalProperties; @FILE reads the schema from a file",
        doc="write JSON that conforms to this JSON schema, whose objects have no other keys than "
        "their properties unless it has additionalProperties",
        annotation="Mapping[str, Any] | bool",
        rule="a JSON schema",
        metavar="JSON|@FILE",
        parse=_parse_json_schema,
    )
    regex: str | None = option(
        None,
        "write a text that matches this regular expression",
        annotation="str",
        rule="a string that is not empty",
        metavar="REGEX",
    )
    grammar: str | None = option(
        None,
        "write a text of this grammar, in the Lark format or in GBNF; @FILE reads it from a file",
        doc="write a text of this grammar, in the Lark format of llguidance or in llama.cpp's GBNF",
        annotation="str",
        rule="a string that is not empty",
        metavar="TEXT|@FILE",
        parse=_parse_grammar,
    )
    stop: str | Sequence[str] = option(
        (),
        "stop before this string; may be repeated",
        doc="stop before the first of these strings",
        accepts=_are_strings,
        rule="a string or a list of strings",
        metavar="TEXT",
        requests=True,
    )
    system: str | None = option(
        None, "system message", rule="a string that is not empty", metavar="TEXT"
    )
    raw: bool = option(
        False,
        "send the prompt as plain text, without the chat template",
        flag="--raw",
    )
    max_images: int = option(MAX_IMAGES, "maximum number of images in a prompt", 1)
    template_args: Mapping[str, Any] | None = option(
        None,
        "extra variables for the chat template, as a JSON object",
        doc="extra variables for the chat template; the default of `enable_thinking` is its value "
        "in the drafter's training, which is False for most drafters",
        rule="a mapping of names to values",
        flag="--chat-template-args",
        metavar="JSON",
        parse=parse_json_object,
    )

    def __post_init__(self) -> None:
        check(self)
        if "" in self.stop_strings:
            raise ConfigError("a stop string is empty; remove it")
        if len(self._forms) > 1:
            raise ConfigError(f"{' and '.join(self._forms)} exclude each other; remove all but one")
        if self.raw and (self.system is not None or self.template_args):
            raise ConfigError(
                "a raw prompt does not use the chat template; remove either raw, or the system "
                "message and the template arguments"
            )
        if self.system is not None:
            check_unicode(self.system, "the system message")
        if self.template_args:
            check_template_args(self.template_args)

    @property
    def has_form(self) -> bool:
        return bool(self._forms)

    @property
    def _forms(self) -> list[str]:
        return [name for name in GRAMMAR_OPTIONS if getattr(self, name) is not None]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


# Written by `python -m tests.tables`, like everything between such marks.
# begin Options
class Options(TypedDict, total=False):
    """Keywords of `generate`, `stream` and `generate_many`."""

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
    max_images: int
    template_args: Mapping[str, Any] | None


# end Options


OPTIONS = options_of(TextConfig)
"""The options by name, in the order of `Options`."""


def describe(option: Option) -> str:
    """Describe an option in lines of a docstring: its name, type, meaning and default."""
    text = f"{option.name} ({option.type_name}): {option.doc or option.help}. "
    default = f"Default: {option.default_text}.".replace(" ", "\0")  # stays on one line
    lines = textwrap.wrap(
        text + default,
        96,
        initial_indent=" " * 4,
        subsequent_indent=" " * 8,
        break_long_words=False,
    )
    return "\n".join(lines).replace("\0", " ")


def document_options(documented: Any, options: Collection[Option]) -> None:
    """Add the descriptions of options to the docstring of a function or a class."""
    text = "\n".join(["Options:", *map(describe, options)])
    documented.__doc__ = f"{inspect.cleandoc(documented.__doc__ or '')}\n\n{text}\n"


document_options(Options, OPTIONS.values())


def parse_options(options: Options) -> TextConfig:
    """Make a configuration of options.

    Raises a ConfigError for an unknown or invalid option, and a PromptError for variables of the
    chat template that are reserved.
    """
    values: dict[str, Any] = dict(options)
    check_names(values, OPTIONS)
    if "stop_token_ids" in values:
        token_ids = values["stop_token_ids"]
        _check_token_ids("stop_token_ids", token_ids, Collection, "token ids")
        values["stop_token_ids"] = frozenset(token_ids)
    if "logit_bias" in values:
        biases = values["logit_bias"]
        _check_token_ids("logit_bias", biases, Mapping, "a mapping of token ids to numbers")
        values["logit_bias"] = tuple(sorted(biases.items()))

    def make(config: Callable[..., Any], **others: Any) -> Any:
        own = {name: one for name, one in OPTIONS.items() if one.owner is config}
        given = {one.field: values[name] for name, one in own.items() if name in values}
        return config(**given, **others)

    decode = make(DecodeConfig, sampling=make(SamplingConfig), penalties=make(Penalties))
    text: TextConfig = make(TextConfig, decode=decode)
    return text


def _check_token_ids(name: str, value: Any, kind: type, rule: str) -> None:
    if not isinstance(value, kind) or not all(isinstance(x, Integral) for x in value):  # type: ignore[attr-defined]
        raise ConfigError(f"{name} must be {rule}, got {value!r}")


def check_names(given: Collection[str], known: Collection[str]) -> None:
    """Raise a ConfigError for the first given option that is not known."""
    if unknown := sorted(set(given) - set(known)):
        meant = did_you_mean(unknown[0], known)
        raise ConfigError(f"unknown option {unknown[0]!r}{meant}; options are {', '.join(known)}")


def lists_options(options: Collection[Option]) -> Callable[[Function], Function]:
    """Return a decorator that adds options to the docstring and the signature of a function."""

    def decorate(function: Function) -> Function:
        document_options(function, options)
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        named += [
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=one.default if one.shown is None else ...,
                annotation=one.annotation,
            )
            for one in options
        ]
        function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
        return function

    return decorate
