"""The command line options that commands share, each in one table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, cast

from rich.console import Console

from treeflash.config import (
    AUTO,
    DTYPES,
    MAX_BUDGET,
    METHODS,
    DecodeConfig,
    LoadConfig,
    Penalties,
    SamplingConfig,
)
from treeflash.drafters.config import SINK
from treeflash.errors import PromptError
from treeflash.hub.models import model_name
from treeflash.language_model import LanguageModel, LocatedPair, locate
from treeflash.registry import fall_back_to_cpu
from treeflash.text.options import FORMS, Options, parse_options
from treeflash.text.prompt import read_text
from treeflash.text.stream import Parallel

T = TypeVar("T")
Flags = dict[str, dict[str, Any]]
"""By option, the arguments of `add_argument`; `flag` replaces the flag that the name gives."""


def parse_budget(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"neither auto nor a number of nodes: {text}") from None


def parse_head_vocab(text: str) -> int | None:
    if text == "full":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"neither full nor a number: {text}")
    return int(text)


def parse_head_rows(text: str) -> int | str | None:
    return AUTO if text == AUTO else parse_head_vocab(text)


def _parse_parallel(text: str) -> Parallel:
    if text == AUTO:
        return AUTO
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"neither auto nor a number of sequences: {text}")
    return int(text)


def _parse_switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"neither on nor off: {text}")
    return text == "on"


def _parse_json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    return value


def _parse_logit_bias(text: str) -> dict[int, float]:
    values = _parse_json_object(text)
    if not all(key.isdecimal() and type(bias) in (int, float) for key, bias in values.items()):
        raise argparse.ArgumentTypeError(f"not numbers by token id: {text}")
    return {int(key): float(bias) for key, bias in values.items()}


def _parse_grammar(text: str) -> str:
    """The text, or the content of the file whose name follows an `@`."""
    if not text.startswith("@"):
        return text
    try:
        return read_text(Path(text[1:]))
    except PromptError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _flag(help: str, **settings: Any) -> dict[str, Any]:
    return {"help": help, **settings}


DEVICE_FLAGS: Flags = {
    "backend": _flag(
        "cuda, mlx, reference or another installed backend (default: the best installed)",
        metavar="NAME",
    ),
    "device": _flag("a device of the backend, such as cuda:1, gpu or cpu (default: the fastest)"),
    "dtype": _flag("number format of the models (default: chosen by the backend)", choices=DTYPES),
    "target": _flag("the model to run (default: SmolLM2-135M-Instruct)", metavar="FOLDER_OR_ID"),
}
"""The options that choose a target and a device."""
MODEL_FLAGS: Flags = DEVICE_FLAGS | {
    "drafter": _flag(
        "a drafter for the target, auto for the published one, or self for the MTP head in the "
        "target's own folder (default: auto, then self)",
        metavar="FOLDER_OR_ID",
    ),
    "device_map": _flag(
        "put the target's layers on as many GPUs as they need; needs accelerate (cuda)",
        choices=[AUTO],
    ),
    "adapter": _flag("merge a LoRA adapter of PEFT or mlx-lm into the target", metavar="FOLDER"),
    "draft_bits": _flag("quantise the drafter to N bits (mlx)", type=int, metavar="N"),
    "draft_window": _flag(
        f"the drafter sees only the first {SINK} and the last N tokens (default: all; mlx: 4096)",
        type=int,
        metavar="N",
    ),
    "kv_bits": _flag(
        "quantise the KV cache to N bits (mlx: 4 or 8; cuda: 8)", type=int, metavar="N"
    ),
    "exact": _flag(
        "make the target's logits bitwise equal for every method, budget and batch, or refuse "
        "(cuda; default: in half precision on a CPU where possible)",
        action=argparse.BooleanOptionalAction,
    ),
    "cuda_graphs": _flag(
        "do not replay trees and drafts as CUDA graphs (cuda)",
        flag="--no-cuda-graphs",
        action="store_false",
    ),
    "wired": _flag(
        "keep the models and 5 GiB more in memory while the process runs, whatever other programs "
        "need (mlx on a Mac)",
        action="store_true",
    ),
    "compile": _flag(
        "compile the target's layers with torch.compile, which takes minutes (cuda)",
        action="store_true",
    ),
}
"""The options that choose a target, a drafter and a device."""
DECODE_FLAGS: Flags = {
    "method": _flag(
        "drafting method (default: the best that the drafter supports; suffix if none is known)",
        choices=METHODS,
    ),
    "budget": _flag(
        f"nodes of a draft tree with its root, at most {MAX_BUDGET}; auto chooses the fastest size",
        type=parse_budget,
        metavar="N|auto",
    ),
    "top_m": _flag("previous-token candidates per depth", type=int),
    "top_k_children": _flag("children per previous token", type=int),
    "head_vocab": _flag(
        "number of most probable tokens that the AR head scores, or full for the whole vocabulary",
        type=parse_head_vocab,
        metavar="full|N",
    ),
    "head_rows": _flag(
        "number of most probable previous tokens that the AR head conditions on, full for all, or "
        "auto to follow the budget",
        type=parse_head_rows,
        metavar="full|N|auto",
    ),
    "suffix": _flag(
        "whether trees also copy what followed the last tokens earlier in the text",
        type=_parse_switch,
        metavar="on|off",
    ),
    "draft_depths": _flag(
        "depths to draft at most; each costs MTP and EAGLE-3 heads a pass (default: all)", type=int
    ),
    "draft_temperature": _flag(
        "temperature of the drafter, which adapts to each text; it shapes the trees, never the "
        "text",
        type=float,
    ),
    "calibration": _flag(
        "whether trees adapt to how sharp the drafter's distributions proved to be in the text so "
        "far; off builds them as published",
        type=_parse_switch,
        metavar="on|off",
    ),
    "max_tokens": _flag("maximum number of new tokens", type=int),
    "temperature": _flag("sampling temperature; 0 is greedy", type=float),
    "top_k": _flag("sample from the K most probable tokens; 0 for all", type=int),
    "top_p": _flag(
        "sample from the most probable tokens whose probabilities add up to P", type=float
    ),
    "min_p": _flag("drop tokens less probable than P times the most probable one", type=float),
    "seed": _flag("random seed for sampling", type=int),
    "repetition_penalty": _flag(
        "above 1, tokens of the prompt and of the text become less probable", type=float
    ),
    "presence_penalty": _flag("subtracted from the logits of tokens in the text", type=float),
    "frequency_penalty": _flag(
        "subtracted from a token's logit for each time that it is in the text", type=float
    ),
    "logit_bias": _flag(
        "numbers to add to logits, by token id, as a JSON object",
        type=_parse_logit_bias,
        metavar="JSON",
    ),
    "log_probs": _flag(
        "report the log probability of each token and of the N most probable tokens",
        flag="--logprobs",
        type=int,
        metavar="N",
    ),
    "json_schema": _flag(
        "write JSON that conforms to this JSON schema, or to the schema in a file",
        type=lambda text: _parse_json_object(_parse_grammar(text)),
        metavar="JSON|@FILE",
    ),
    "regex": _flag("write a text that matches this regular expression", metavar="REGEX"),
    "grammar": _flag(
        "write a text of this grammar, in the Lark format or in GBNF, or of the grammar in a file",
        type=_parse_grammar,
        metavar="TEXT|@FILE",
    ),
    "stop": _flag("stop before this string; may be repeated", action="append", metavar="TEXT"),
    "system": _flag("system message", metavar="TEXT"),
    "raw": _flag("send the prompt as plain text, without the chat template", action="store_true"),
    "template_args": _flag(
        "extra variables for the chat template, as a JSON object",
        flag="--chat-template-args",
        type=_parse_json_object,
        metavar="JSON",
    ),
}
"""The options of decoding, by their names in `Options`."""
SERVER_OPTIONS = tuple(
    name
    for name in DECODE_FLAGS
    if not name.endswith("_penalty") and name not in ("logit_bias", "log_probs", *FORMS)
)
"""The decoding options that a server has defaults for."""


def add_device_options(parser: argparse.ArgumentParser) -> None:
    _add(parser.add_argument_group("models"), DEVICE_FLAGS)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    _add(parser.add_argument_group("models"), MODEL_FLAGS)


def add_decode_options(
    parser: argparse.ArgumentParser,
    names: Collection[str] = DECODE_FLAGS.keys(),
    note: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Add the decoding options of these names; options that are not given stay unset.

    `note` has defaults that differ from a configuration's, for the help.
    """
    flags: Flags = {}
    for name in names:
        default = getattr(DecodeConfig, name, getattr(SamplingConfig, name, None))
        if name.endswith("_penalty"):
            default = getattr(Penalties, name.removesuffix("_penalty"))
        default = note.get(name, default)
        default = "on" if default is True else default
        shown = "" if default is None or name == "method" else f" (default: {default})"
        text = DECODE_FLAGS[name]["help"] + shown
        flags[name] = DECODE_FLAGS[name] | {"help": text, "default": argparse.SUPPRESS}
    _add(parser.add_argument_group("decoding"), flags)


def add_parallel_option(
    parser: argparse.ArgumentParser, default: Parallel | None, help: str
) -> None:
    parser.add_argument(
        "--parallel", type=_parse_parallel, default=default, metavar="N|auto", help=help
    )


def decode_options(args: argparse.Namespace) -> Options:
    """The decoding options that were given; an invalid one raises a ConfigError."""
    names = Options.__annotations__.keys()
    options = cast(Options, {key: value for key, value in vars(args).items() if key in names})
    parse_options(options)
    return options


def with_device(args: argparse.Namespace, run: Callable[[LoadConfig], T]) -> T:
    """Call `run` with the chosen device, or with the CPU as `fall_back_to_cpu` does."""
    named = args.backend is not None or args.device is not None
    return fall_back_to_cpu(run, LoadConfig(device=args.device, dtype=args.dtype), named=named)


def locate_model(args: argparse.Namespace, methods: Collection[str | None] = ()) -> LocatedPair:
    """Fetch the chosen models; no drafter if the methods need none. None is the default method."""
    drafter: str | Literal[False] | None = args.drafter
    if drafter is None and methods and set(methods) <= {"ar", "suffix"}:
        drafter = False
    names = {field.name for field in fields(LoadConfig)}
    settings = {name: value for name, value in vars(args).items() if name in names}
    return locate(args.target, drafter, backend=args.backend, **settings)


def load_model(args: argparse.Namespace, methods: Collection[str | None] = ()) -> LanguageModel:
    """Load the models of `locate_model`; a spinner on a terminal says which."""
    return load_located(locate_model(args, methods))


def load_located(pair: LocatedPair) -> LanguageModel:
    """Load models, while a spinner on a terminal says which."""
    # Not while they are located, because a download has a progress bar of its own.
    with Console(stderr=True).status(f"loading {model_name(pair.target)}"):
        return pair.load()


def _add(group: Any, flags: Flags) -> None:
    for name, settings in flags.items():
        arguments = {"flag": f"--{name.replace('_', '-')}", **settings}
        group.add_argument(arguments.pop("flag"), dest=name, **arguments)
