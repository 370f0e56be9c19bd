"""Options that commands share, and the models that they choose."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection
from typing import Any, Literal, NoReturn, TypeVar, cast

from treeflash.config import (
    AUTO,
    DTYPES,
    MAX_BUDGET,
    METHODS,
    DecodeConfig,
    LoadConfig,
    SamplingConfig,
)
from treeflash.drafters.context_window import SINK
from treeflash.errors import ConfigError
from treeflash.language_model import LanguageModel, load
from treeflash.registry import on_some_device
from treeflash.text.many_texts import Parallel
from treeflash.text.options import Options, parse_options

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations whose errors are those of this package."""

    def __init__(self, name: str, description: str) -> None:
        """Start a parser for `python -m {name}`."""
        super().__init__(prog=f"python -m {name}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, so that the error is a single line.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}; see --help")


def add_device_options(parser: argparse.ArgumentParser) -> Any:
    """Add the options that choose a target and a device; returns their group."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--backend",
        metavar="NAME",
        help="cuda, mlx, reference or another installed backend (default: the best installed)",
    )
    group.add_argument(
        "--device",
        help="a device of the backend, such as cuda, cuda:1, gpu or cpu (default: the fastest)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="number format of the models (default: chosen by the backend)",
    )
    group.add_argument(
        "--target",
        metavar="FOLDER_OR_ID",
        help="the model to run (default: SmolLM2-135M-Instruct)",
    )
    return group


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a target, a drafter and a device."""
    group = add_device_options(parser)
    group.add_argument(
        "--drafter",
        metavar="FOLDER_OR_ID",
        help="a drafter for the target, or auto for the published one (default: auto)",
    )
    group.add_argument(
        "--device-map",
        choices=[AUTO],
        help="put the target's layers on as many GPUs as it needs; needs accelerate (cuda)",
    )
    group.add_argument(
        "--draft-bits", type=int, metavar="N", help="quantise the drafter to N bits (mlx)"
    )
    group.add_argument(
        "--draft-window",
        type=int,
        metavar="N",
        help=f"the drafter sees only the first {SINK} and the last N tokens (default: all)",
    )
    group.add_argument(
        "--kv-bits",
        type=int,
        metavar="N",
        help="quantise the KV cache to N bits (mlx: 4 or 8; cuda: 8)",
    )
    group.add_argument(
        "--no-cuda-graphs",
        dest="cuda_graphs",
        action="store_false",
        help="do not replay trees and drafts as CUDA graphs (cuda)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the target's layers with torch.compile, which takes minutes (cuda)",
    )


def add_decode_options(parser: argparse.ArgumentParser) -> None:
    """Add the decoding options; those that are not given stay unset."""
    group = parser.add_argument_group("decoding")

    def add(flag: str, help: str, default: object = None, **settings: Any) -> None:
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, help=help + shown, default=argparse.SUPPRESS, **settings)

    add(
        "--method",
        "drafting method (default: the best that the drafter supports)",
        choices=METHODS,
    )
    add(
        "--budget",
        f"nodes of a draft tree with its root, at most {MAX_BUDGET}; auto chooses the fastest size",
        DecodeConfig.budget,
        type=budget,
        metavar="N|auto",
    )
    add("--top-m", "previous-token candidates per depth", DecodeConfig.top_m, type=int)
    add(
        "--top-k-children",
        "children per previous token",
        DecodeConfig.top_k_children,
        type=int,
    )
    add(
        "--head-vocab",
        "tokens that the AR head scores: at most the N most probable, or full for all",
        DecodeConfig.head_vocab,
        type=full_or_number,
        metavar="full|N",
    )
    add(
        "--head-rows",
        "previous tokens that the AR head conditions on: the N most probable, full for all, or "
        "auto to follow the budget",
        DecodeConfig.head_rows,
        type=head_rows,
        metavar="full|N|auto",
    )
    add(
        "--draft-temperature",
        "temperature of the drafter, which each text then corrects; it shapes the trees, never the "
        "text",
        DecodeConfig.draft_temperature,
        type=float,
    )
    add("--max-tokens", "maximum number of new tokens", DecodeConfig.max_tokens, type=int)
    add(
        "--temperature", "sampling temperature; 0 is greedy", SamplingConfig.temperature, type=float
    )
    add(
        "--top-k",
        "sample from the K most probable tokens; 0 for all",
        SamplingConfig.top_k,
        type=int,
    )
    add(
        "--top-p",
        "sample from the most probable tokens whose probabilities add up to P",
        SamplingConfig.top_p,
        type=float,
    )
    add(
        "--min-p",
        "drop tokens less probable than P times the most probable one",
        SamplingConfig.min_p,
        type=float,
    )
    add("--seed", "random seed for sampling", SamplingConfig.seed, type=int)
    add("--stop", "stop before this string; may be repeated", action="append", metavar="TEXT")
    add("--system", "system message", metavar="TEXT")
    add("--raw", "send the prompt as plain text, without the chat template", action="store_true")
    add(
        "--chat-template-args",
        "extra variables for the chat template, as a JSON object",
        dest="template_args",
        metavar="JSON",
        type=_json_object,
    )


def add_parallel_option(
    parser: argparse.ArgumentParser, default: Parallel | None, help: str
) -> None:
    """Add the option of how many texts to decode at once."""
    parser.add_argument("--parallel", type=_parallel, default=default, metavar="N|auto", help=help)


def decode_options(args: argparse.Namespace) -> Options:
    """The decoding options that were given.

    Raises:
        ConfigError: an option is invalid.
    """
    names = Options.__annotations__.keys()
    options = cast(Options, {key: value for key, value in vars(args).items() if key in names})
    parse_options(options)
    return options


def with_device(args: argparse.Namespace, run: Callable[[LoadConfig], T]) -> T:
    """Run with the chosen device; see `on_some_device`."""
    named = args.backend is not None or args.device is not None
    return on_some_device(run, LoadConfig(device=args.device, dtype=args.dtype), named=named)


def load_model(args: argparse.Namespace, methods: Collection[str] = ()) -> LanguageModel:
    """Load the chosen models; no drafter if the only method is plain decoding."""
    drafter: str | Literal[False] | None = args.drafter
    if drafter is None and set(methods) == {"ar"}:
        drafter = False
    return load(
        args.target,
        drafter,
        backend=args.backend,
        device=args.device,
        dtype=args.dtype,
        device_map=args.device_map,
        draft_bits=args.draft_bits,
        draft_window=args.draft_window,
        kv_bits=args.kv_bits,
        cuda_graphs=args.cuda_graphs,
        compile=args.compile,
    )


def budget(text: str) -> int | str:
    """Parse `--budget`."""
    if text == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"neither auto nor a number of nodes: {text}") from None


def _parallel(text: str) -> Parallel:
    if text == AUTO:
        return AUTO
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"neither auto nor a number of texts: {text}")
    return int(text)


def full_or_number(text: str) -> int | None:
    """Parse `--head-vocab`."""
    if text == "full":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"neither full nor a number: {text}")
    return int(text)


def head_rows(text: str) -> int | str | None:
    """Parse `--head-rows`."""
    return AUTO if text == AUTO else full_or_number(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    return value
