"""Options: what a setting means, which values it takes, and how each interface names it.

A field of a configuration is described once, where it is defined, by `option`. Flags of commands,
fields of requests, keywords of the Python API and tables of the documentation follow from these
descriptions; `python -m tests.tables` writes the parts that are checked in.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from treeflash.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field of a configuration that users can set."""

    owner: type  # the configuration
    field: str  # the name of the field
    name: str  # in Python, in files of options and in requests
    type: Any
    annotation: str  # the source text of the type of values that the Python API accepts
    default: Any  # the value if the option is not set; empty collections stand for nothing
    help: str  # the description, as the command line shows it
    doc: str | None = None  # the description for the Python API, if values differ there
    shown: str | None = None  # describes the default where it is not a value
    minimum: float | None = None  # the least number that is accepted
    maximum: float | None = None  # the largest number that is accepted
    above: float | None = None  # a number that every accepted number exceeds
    choices: tuple[str, ...] = ()  # the texts that are accepted
    # This decides whether a value is accepted, in place of the type and the limits.
    accepts: Callable[[Any], bool] | None = None
    rule: str | None = None  # the accepted values, for messages; by default the limits say it
    # This is the flag if the name does not give it, and "" if there is none. A bool that has one is
    # turned over by its flag, which takes no value.
    flag: str | None = None
    # This stands for the value in help texts and tables; by default it is N or X for a number.
    metavar: str | None = None
    # This reads a value of the command line; by default the type does.
    parse: Callable[[str], Any] | None = None
    requests: bool = False  # whether requests to the server may set the option
    # A request has these limits if they differ from the ones above.
    request_limits: tuple[float, float] | None = None

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The members of the type: classes, None's class and literals."""
        union = get_origin(self.type) in (Union, UnionType)
        return get_args(self.type) if union else (self.type,)

    @property
    def literals(self) -> tuple[str, ...]:
        """The texts among the accepted values, such as `auto`."""
        literals = [get_args(kind) for kind in self.kinds if get_origin(kind) is Literal]
        return tuple(text for texts in literals for text in texts)

    @property
    def type_name(self) -> str:
        """The type in words."""
        if self.choices:
            return "str"
        if not self.literals:
            return self.annotation.replace(" | ", " or ")
        classes = [kind for kind in self.kinds if get_origin(kind) is not Literal]
        names = ["None" if kind is type(None) else kind.__name__ for kind in classes]
        return " or ".join([*names, *(f'"{text}"' for text in self.literals)])

    @property
    def placeholder(self) -> str | None:
        """The name of the value in help texts and tables; None for the name of the flag."""
        number = "N" if int in self.kinds else "X" if float in self.kinds else None
        return self.metavar or number

    @property
    def default_text(self) -> str:
        """The default in words."""
        if self.shown is not None:
            return self.shown
        if self.default in ((), frozenset()):
            return "none"
        return f'"{self.default}"' if isinstance(self.default, str) else str(self.default)

    def check(self, value: object, name: str) -> None:
        """Raise a ConfigError, in which the option has this name, unless the value is accepted."""
        if self.accepts(value) if self.accepts else self._fits(value):
            return
        if self.choices and self.rule is None:
            known = ", ".join(self.choices)
            raise ConfigError(f"unknown {name} {value!r}; choose one of {known}")
        raise ConfigError(
            f"{name} must be {self._missing_kind(value)}{self.accepted_values}, got {value!r}"
        )

    def _missing_kind(self, value: object) -> str:
        """Return the kind of number that a value should be and is not, before `accepted_values`."""
        if self.rule is not None or (self.literals and isinstance(value, str)):
            return ""
        if float in self.kinds:
            return "" if isinstance(value, Real) else "a number, "
        return "a whole number, " if int in self.kinds and not isinstance(value, Integral) else ""

    def _fits(self, value: object) -> bool:
        if self.choices and value is not None:
            return value in self.choices
        return any(self._fits_kind(kind, value) for kind in self.kinds)

    def _fits_kind(self, kind: Any, value: Any) -> bool:
        if get_origin(kind) is Literal:
            return isinstance(value, str) and value in get_args(kind)
        if kind is int:
            return is_whole(value) and self._within_limits(value)
        if kind is float:
            return is_finite(value) and self._within_limits(value)
        return isinstance(value, get_origin(kind) or kind) and value != ""

    def _within_limits(self, value: float) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
        )

    @property
    def accepted_values(self) -> str:
        """The accepted values in words."""
        if self.rule is not None:
            return self.rule
        if bool in self.kinds:
            return "True or False"
        if self.above is not None:
            most = "" if self.maximum is None else f" and at most {self.maximum}"
            return f"above {self.above}{most}"
        if self.maximum is not None:
            return f"between {self.minimum} and {self.maximum}"
        least = f"{self.minimum} or more"
        return ", or ".join([*self.literals, least])


def option(default: Any, help: str, minimum: float | None = None, **settings: Any) -> Any:
    """Define a field of a configuration; `Option` lists the other settings."""
    metadata = {"help": help, "minimum": minimum, **settings}
    return field(default=default, metadata=metadata)


@cache
def options_of(config: type) -> Mapping[str, Option]:
    """Return the options of a configuration and of the configurations in it, by name."""
    options: dict[str, Option] = {}
    types = get_type_hints(config)
    for item in fields(config):
        kind = types[item.name]
        if item.metadata:
            about = {"name": item.name, "annotation": item.type, **item.metadata}
            one = Option(owner=config, field=item.name, type=kind, default=item.default, **about)
            options[one.name] = one
        elif isinstance(kind, type) and is_dataclass(kind):
            options |= options_of(kind)
    return options


def check(config: Any, spell: Callable[[str], str] = str) -> None:
    """Raise a ConfigError for the first option of a configuration whose value is not accepted.

    `spell` writes the name of an option as its users know it.
    """
    for name, one in options_of(config.__class__).items():
        if one.owner is type(config):
            one.check(getattr(config, one.field), spell(name))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Ask for the most similar one of `names`, in parentheses; nothing if none is similar."""
    similar = get_close_matches(name, list(names), n=1, cutoff=0.75)
    return "".join(f" (did you mean {name}?)" for name in similar)


def is_whole(value: object, least: int | None = None) -> bool:
    """Return whether `value` is an integer, Python's or NumPy's, of at least `least`."""
    whole = not isinstance(value, bool) and isinstance(value, Integral)
    return whole and (least is None or int(value) >= least)  # type: ignore[call-overload]


def is_number(value: object) -> bool:
    """Return whether `value` is a real number, Python's or NumPy's."""
    return not isinstance(value, bool) and isinstance(value, Real)


def is_finite(value: Any) -> bool:
    """Return whether `value` is a real number that a float holds: neither infinite nor NaN."""
    return is_number(value) and bool(abs(value) <= sys.float_info.max)


def number_or(words: Mapping[str, Any], counted: str) -> Callable[[str], Any]:
    """Return a function that reads a number of what is `counted`, or a word for another value."""

    def parse(text: str) -> Any:
        if text in words:
            return words[text]
        try:
            return int(text)
        except ValueError:
            known = ", ".join(words)
            raise argparse.ArgumentTypeError(
                f"must be {known} or a number of {counted}, got {text}"
            ) from None

    return parse


def parse_switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, got {text}")
    return text == "on"


def parse_json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"invalid JSON ({error}): {text}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value
