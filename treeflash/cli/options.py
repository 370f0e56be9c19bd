"""The options of commands: flags that follow from configurations, and what they choose."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args, get_origin

from rich.console import Console
from rich.text import Text

from treeflash.config import AUTO, LoadConfig, Parallel
from treeflash.hub.published import model_name
from treeflash.interruption import never_swallowed
from treeflash.option import Option, options_of
from treeflash.text.forms import check_form
from treeflash.text.options import GRAMMAR_OPTIONS, OPTIONS, Options, parse_options

if TYPE_CHECKING:
    from treeflash.language_model import LanguageModel, LocatedPair

T = TypeVar("T")
DECODE_OPTIONS = {name: one for name, one in OPTIONS.items() if one.flag != ""}
"""The decoding options that have a flag, by name."""
SERVER_OPTIONS = tuple(
    name
    for name in DECODE_OPTIONS
    if not name.endswith("_penalty")
    and name not in ("logit_bias", "log_probs", "raw", *GRAMMAR_OPTIONS)
)
"""The decoding options that a server has defaults for."""
LOAD_OPTIONS = options_of(LoadConfig)
DEVICE_OPTIONS = ("device", "dtype", "threads")
"""The options of `LoadConfig` that commands without a drafter have too."""


def flag_of(option: Option) -> str:
    return option.flag or f"--{option.name.replace('_', '-')}"


def add_option(
    group: Any, option: Option, *, default: Any = argparse.SUPPRESS, shown: object = None
) -> None:
    """Add the flag of an option; without a `default` it stays unset unless it is given.

    `shown` is the default that the help shows, if it is not the option's own.
    """
    items = [get_args(kind)[0] for kind in option.kinds if get_origin(kind) is tuple]
    kinds = items or option.kinds
    settings: dict[str, Any] = {}
    if bool in kinds and option.flag:
        settings["action"] = "store_false" if option.default else "store_true"
    elif bool in kinds and option.parse is None:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        numbers = [kind for kind in (int, float) if kind in kinds]
        settings = {"type": option.parse or (*numbers, str)[0], "metavar": option.placeholder}
        if option.choices:
            settings["choices"] = option.choices
        if items and option.parse is None:
            settings["nargs"] = "+"
        elif any(get_origin(kind) is Sequence for kind in kinds):
            settings["action"] = "append"
    text = _default_text(option) if shown is None else str(shown)
    help = f"{option.help} (default: {text})" if text else option.help
    group.add_argument(flag_of(option), dest=option.name, default=default, help=help, **settings)


def _default_text(option: Option) -> str:
    """Write a default as on the command line; empty if there is none, or only the flag."""
    default = option.shown or option.default
    if default is None or isinstance(default, frozenset):
        return ""
    if isinstance(default, bool):
        return "" if option.flag else "on" if default else "off"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def add_options(
    group: Any,
    config: type,
    leave_out: Collection[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Add the options of a configuration; those that are not given stay unset.

    `leave_out` names options that get no flag, and `defaults` has what the help shows in place of
    the configuration's own defaults.
    """
    for name, one in options_of(config).items():
        if name not in leave_out:
            add_option(group, one, shown=defaults.get(name))


def add_device_options(parser: argparse.ArgumentParser, *, several: bool = False) -> Any:
    """Add the options that choose a target, or `several`, and a device; return their group."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--backend",
        metavar="NAME",
        help="cuda, cpu, mlx, reference or another installed backend (default: the best one "
        "installed, and cpu where cuda finds no GPU)",
    )
    for name in DEVICE_OPTIONS:
        add_option(group, LOAD_OPTIONS[name], default=LOAD_OPTIONS[name].default)
    group.add_argument(
        "--target",
        metavar="FOLDER_OR_ID",
        action="append" if several else "store",
        help="the model to run: a folder, a hub id or a GGUF file"
        f"{'; may be repeated' * several} (default: SmolLM2-135M-Instruct)",
    )
    return group


def add_model_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add the options that choose a target, or `several`, a drafter and a device."""
    group = add_device_options(parser, several=several)
    group.add_argument(
        "--drafter",
        metavar="FOLDER_OR_ID",
        help="a drafter for the target: a folder, a hub id or a GGUF file; auto for the published "
        "one; or self for the MTP head in the target's folder (default: auto, then self)",
    )
    for name, one in LOAD_OPTIONS.items():
        if name not in DEVICE_OPTIONS:
            add_option(group, one, default=one.default)


def add_decode_options(
    parser: argparse.ArgumentParser,
    names: Collection[str] = DECODE_OPTIONS.keys(),
    note: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Add the decoding options of these names; options that are not given stay unset.

    `note` has defaults that differ from a configuration's, for the help.
    """
    group = parser.add_argument_group("decoding")
    for name in names:
        add_option(group, DECODE_OPTIONS[name], shown=note.get(name))


def _parse_parallel(text: str) -> Parallel:
    if text == AUTO:
        return AUTO
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be auto or a number of sequences, got {text}")
    return int(text)


def add_parallel_option(
    parser: argparse.ArgumentParser, default: Parallel | None, help: str
) -> None:
    parser.add_argument(
        "--parallel", type=_parse_parallel, default=default, metavar="N|auto", help=help
    )


def decode_options(args: argparse.Namespace) -> Options:
    """Return the decoding options that were given; an invalid one raises a ConfigError."""
    options = cast(Options, {key: value for key, value in vars(args).items() if key in OPTIONS})
    check_form(parse_options(options))
    return options


def with_device(args: argparse.Namespace, run: Callable[[LoadConfig], T]) -> T:
    """Call `run` with the chosen device, or with the CPU as `fall_back_to_cpu` does."""
    from treeflash.registry import fall_back_to_cpu  # its imports take longer than `--help`

    named = args.backend is not None or args.device is not None
    config = LoadConfig(**{name: getattr(args, name) for name in DEVICE_OPTIONS})
    return fall_back_to_cpu(run, config, named=named)


def locate_model(
    args: argparse.Namespace, methods: Collection[str | None] = (), **changes: Any
) -> LocatedPair:
    """Fetch the chosen models; no drafter if the methods need none. None is the default method.

    `changes` are options that replace the command line's.
    """
    from treeflash.language_model import locate  # its imports take longer than `--help`

    chosen = {**vars(args), **changes}
    drafter: str | Literal[False] | None = chosen["drafter"]
    if drafter is None and methods and set(methods) <= {"ar", "suffix"}:
        drafter = False
    settings: Any = {name: value for name, value in chosen.items() if name in LOAD_OPTIONS}
    return locate(chosen["target"], drafter, backend=chosen["backend"], **settings)


def load_model(
    args: argparse.Namespace, methods: Collection[str | None] = (), **changes: Any
) -> LanguageModel:
    """Load the models of `locate_model`, while a spinner on a terminal says which."""
    with never_swallowed():
        pair = locate_model(args, methods, **changes)
        # The models are on this machine by now: a download would show its own progress bar.
        with Console(stderr=True).status(Text(f"loading {model_name(pair.target)}")):
            return pair.load()
