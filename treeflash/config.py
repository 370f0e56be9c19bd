"""Settings for sampling, decoding and loading: frozen, keyword-only, checked when made."""

from __future__ import annotations

import argparse
import errno
import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from platformdirs import user_cache_dir
from rich.filesize import pick_unit_and_suffix

from treeflash.errors import ConfigError
from treeflash.option import (
    check,
    is_finite,
    is_number,
    is_whole,
    number_or,
    option,
    parse_json_object,
    parse_switch,
)
from treeflash.processors import most_threads

Method = Literal["ar", "dflash", "ddtree", "treeflash", "treeflash-chain", "suffix"]
METHODS: tuple[Method, ...] = get_args(Method)
Budget = int | Literal["auto"]
HeadRows = int | Literal["auto"] | None
Parallel = int | Literal["auto"]
"""Number of sequences to decode at once."""
AUTO_SEQUENCES = 16
"""Sequences that `auto` decodes at once. 8 and 32 gave fewer tokens per second of processor time
with SmolLM2-135M in bfloat16 on a CPU (62 and 65, against 74; 32 prompts)."""
AUTO_BYTES = 4 << 30
"""Device memory for the KV caches of these sequences; `auto` decodes fewer if they need more."""
AUTO: Literal["auto"] = "auto"
SEEDS = 1 << 64
"""Number of seeds; 0 follows the last one."""
GIB = 1 << 30
"""Bytes of a gibibyte."""
DTYPES = ("float32", "bfloat16", "float16")
MAX_BUDGET = 1024
"""Nodes of a draft tree. A larger one would cost far more than it could gain, and run out of
memory."""
SINK = 4
"""First positions that a drafter with a window still sees: they are where attention puts surplus
weight (StreamingLLM, arXiv 2309.17453)."""


def later_seed(seed: int, n: int) -> int:
    """Return the seed that is `n` seeds after one, which may be a number of NumPy."""
    return (int(seed) + n) % SEEDS


def cache_folder() -> Path:
    """Return the folder for all we store; a ConfigError if TREEFLASH_CACHE is invalid."""
    folder = Path(os.environ.get("TREEFLASH_CACHE") or user_cache_dir("treeflash"))
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"TREEFLASH_CACHE is {str(folder)!r}: {error}") from None


def size_text(nbytes: int) -> str:
    """Write a number of bytes in a unit that leaves digits before the point, such as 1.5 MiB."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    unit, name = pick_unit_and_suffix(nbytes, units, 1024)
    return f"{nbytes / unit:.{1 if unit > 1 else 0}f} {name}"


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Raise a ConfigError if a file, or a `folder` that may have to be made, cannot be written.

    Nothing is made: a command asks before it loads a model, which may fail.
    """
    whole = path.absolute()
    above = whole.parents if folder else [whole.parent]
    place = next(filter(os.path.exists, [whole, *above]), None)
    obstacle: int | None = None
    if place is None:
        obstacle = errno.ENOENT
    elif place.is_dir() != (folder or place != whole):
        obstacle = errno.EISDIR if place.is_dir() else errno.ENOTDIR
    elif not os.access(place, os.W_OK):
        obstacle = errno.EACCES
    if obstacle is not None:
        raise ConfigError(f"{path} cannot be written: {os.strerror(obstacle)}")


def write_whole(path: Path, contents: str | bytes) -> None:
    """Write a file as a whole, or leave what was there and raise an OSError."""
    scratch = path.with_name(f".{path.name}.{time.monotonic_ns()}")
    try:
        if isinstance(contents, bytes):
            scratch.write_bytes(contents)
        else:
            scratch.write_text(contents, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def remember(path: Path, contents: str | bytes) -> None:
    """Replace a file of the cache as a whole; that its folder cannot be written is not an error.

    The next process then finds out again what the file would have told it.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, contents)


def _parse_logit_bias(text: str) -> dict[int, float]:
    values = parse_json_object(text)
    if not all(key.isdecimal() and (type(x) is float or is_finite(x)) for key, x in values.items()):
        raise argparse.ArgumentTypeError(f"must be numbers by token id, got {text}")
    return {int(key): float(bias) for key, bias in values.items()}


def _is_temperature(value: object) -> bool:
    """Return whether a temperature is greedy, or keeps logits finite and distinct."""
    return is_number(value) and (value == 0 or 1e-6 <= value <= 1e6)  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the target samples a token from its logits.

    The temperature applies first; at 0 the filters and the seed have no effect. The filters follow
    in the order top-k, top-p, min-p, each on the tokens that the previous filter kept. The seed and
    a token's absolute position determine the noise that samples the token, so that a seed gives
    the same text with every method and budget.
    """

    temperature: float = option(
        0.0,
        "sampling temperature; 0 is greedy",
        0,
        metavar="T",
        accepts=_is_temperature,
        rule="0 (greedy), or from 1e-6 to 1e6",
        requests=True,
    )
    top_k: int = option(
        0,
        "sample from the K most probable tokens; 0 or -1 for all",
        -1,
        metavar="K",
        requests=True,
    )
    top_p: float = option(
        1.0,
        "sample from the smallest set of most probable tokens whose probabilities add up to P",
        above=0,
        maximum=1,
        metavar="P",
        requests=True,
    )
    min_p: float = option(
        0.0,
        "drop tokens less probable than P times the most probable one",
        0,
        maximum=1,
        metavar="P",
        requests=True,
    )
    seed: int = option(
        0,
        "random seed for sampling",
        0,
        doc="random seed for sampling; -1 in a request chooses a new one",
        maximum=SEEDS - 1,
        rule="between 0 and 2**64 - 1",
        requests=True,
        request_limits=(-(2**63), SEEDS - 1),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.top_k == -1:  # vLLM's value for no limit
            object.__setattr__(self, "top_k", 0)

    @property
    def greedy(self) -> bool:
        """Whether the target always takes its most probable token."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """Changes of the target's logits before sampling, which depend on the tokens so far.

    The repetition penalty divides positive logits and multiplies negative ones (Keskar et al.
    2019). The logit bias is kept as pairs of a token id and a number.
    """

    # Requests beyond OpenAI's limits could overflow the logits.
    repetition: float = option(
        1.0,
        "values above 1 make tokens that occur in the prompt or the text less probable",
        name="repetition_penalty",
        requests=True,
        request_limits=(0.01, 100),
    )
    presence: float = option(
        0.0,
        "number to subtract from the logits of tokens that occur in the text",
        name="presence_penalty",
        requests=True,
        request_limits=(-2, 2),
    )
    frequency: float = option(
        0.0,
        "number to subtract from a token's logit for each time that it occurs in the text",
        name="frequency_penalty",
        requests=True,
        request_limits=(-2, 2),
    )
    logit_bias: tuple[tuple[int, float], ...] = option(
        (),
        "numbers to add to the logits of tokens, as a JSON object with token ids as keys",
        doc="numbers to add to the logits of tokens, by token id",
        annotation="Mapping[int, float]",
        metavar="JSON",
        parse=_parse_logit_bias,
        requests=True,
        request_limits=(-100, 100),
    )

    def __post_init__(self) -> None:
        if not (is_finite(self.repetition) and self.repetition > 0):
            raise ConfigError(f"repetition penalty must be above 0, got {self.repetition!r}")
        for name in ("presence", "frequency"):
            value = getattr(self, name)
            if not is_finite(value):
                raise ConfigError(f"{name} penalty must be a finite number, got {value!r}")
        tokens = [token for token, _ in self.logit_bias]
        if len(set(tokens)) < len(tokens) or not all(
            is_whole(token, 0) and (is_finite(bias) or bias == -math.inf)
            for token, bias in self.logit_bias
        ):
            raise ConfigError(
                "logit_bias must give one number per token id, neither inf nor NaN, got "
                f"{dict(self.logit_bias)!r}"
            )

    @property
    def active(self) -> bool:
        """Whether any logit changes."""
        return self != Penalties()


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How one sequence is decoded.

    The defaults of `top_m`, `top_k_children` and `draft_temperature` are the published ones
    (TreeFlash, section 4). `budget` and `head_vocab` have measured ones (docs/history.md) in place
    of the published 64 nodes and whole vocabulary.
    """

    method: Method = option(
        "treeflash",
        "drafting method",
        doc="`ar` decodes without drafting; `dflash` drafts a chain and `ddtree` a tree from the "
        "drafter's marginals; `treeflash-chain` and `treeflash` draft with its AR head; `suffix` "
        "needs no drafter and copies what followed the last tokens earlier in the text",
        shown="the best that the drafter supports; suffix if none is known",
        choices=METHODS,
        requests=True,
    )
    budget: Budget = option(
        AUTO,
        f"number of nodes in a draft tree, including its root, up to {MAX_BUDGET}; auto chooses "
        "the fastest size",
        1,
        maximum=MAX_BUDGET,
        rule=f"auto, or from 1 to {MAX_BUDGET} nodes",
        metavar="N|auto",
        parse=number_or({AUTO: AUTO}, "nodes"),
        requests=True,
    )
    top_m: int = option(16, "previous-token candidates per depth", 1)
    top_k_children: int = option(16, "children per previous token", 1)
    head_vocab: int | None = option(
        1024,
        "number of most probable tokens that the AR head scores, or full for the whole vocabulary",
        1,
        doc="number of most probable tokens that the AR head scores; None is the whole vocabulary",
        metavar="full|N",
        parse=number_or({"full": None}, "tokens"),
    )
    head_rows: HeadRows = option(
        AUTO,
        "number of most probable previous tokens that the AR head conditions on, full for all, or "
        "auto to follow the budget",
        1,
        doc="number of most probable previous tokens that the AR head conditions on; None is all, "
        "auto follows the budget",
        metavar="full|N|auto",
        parse=number_or({"full": None, AUTO: AUTO}, "tokens"),
    )
    suffix: bool = option(
        True,
        "whether trees include copies of what followed the last tokens earlier in the text",
        metavar="on|off",
        parse=parse_switch,
    )
    draft_depths: int | None = option(
        None,
        "maximum number of depths to draft; each costs MTP and EAGLE-3 heads one pass "
        "(default: all)",
        1,
        doc="maximum number of depths to draft, None for all; each costs MTP and EAGLE-3 heads one "
        "pass",
    )
    draft_temperature: float = option(
        1.0,
        "temperature of the drafter at the start of a text, to which it then adapts; it changes "
        "the trees, never the text",
        1e-6,
        maximum=1e6,
        rule="from 1e-6 to 1e6",
    )
    calibration: bool = option(
        True,
        "whether to sharpen or flatten the drafter's probabilities by how often they were right in "
        "the text so far; off builds trees as published",
        doc="whether to sharpen or flatten the drafter's probabilities by how often they were "
        "right in the text so far; False builds trees as published",
        metavar="on|off",
        parse=parse_switch,
    )
    max_tokens: int = option(256, "maximum number of new tokens", 1, requests=True)
    stop_token_ids: frozenset[int] = option(
        frozenset(),
        "tokens that end the text; the token that ends it is part of the text",
        annotation="Collection[int]",
        rule="a frozenset of token ids",
        shown="the end tokens of the target",
        flag="",
    )
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    penalties: Penalties = field(default_factory=Penalties)
    log_probs: int | None = option(
        None,
        "report the log probability of each token and of the N most probable tokens",
        0,
        rule="0 or more, or None",
        flag="--logprobs",
    )

    def __post_init__(self) -> None:
        check(self)

    @property
    def drafts(self) -> bool:
        """Whether the method needs a drafter."""
        return self.method not in ("ar", "suffix")

    @property
    def speculates(self) -> bool:
        """Whether the method verifies more than one token at once."""
        return self.method != "ar"

    @property
    def copies(self) -> bool:
        """Whether trees have what followed earlier occurrences of the last tokens."""
        return self.method == "suffix" or (self.suffix and self.drafts and not self.drafts_chain)

    @property
    def drafts_chain(self) -> bool:
        """Whether the method drafts a chain, not a tree."""
        return self.method in ("dflash", "treeflash-chain")

    @property
    def is_adaptive(self) -> bool:
        """Whether the trees have the size that pays, iteration by iteration."""
        return self.speculates and self.budget == AUTO

    @property
    def uses_head(self) -> bool:
        """Whether the method needs the drafter's AR head."""
        return self.method.startswith("treeflash")


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Where and how a backend loads its models. A backend refuses settings that it lacks."""

    device: str | None = option(
        None,
        "a device of the backend, such as cuda:1, gpu or cpu",
        shown="the fastest",
        rule="the name of a device, such as cpu or cuda:1",
    )
    dtype: str | None = option(
        None,
        "data type of the models",
        shown="the checkpoint's; on a CPU float32 beside weights of few bits, and where cuda "
        "has no exact mode in half precision",
        choices=DTYPES,
    )
    device_map: Literal["auto"] | None = option(
        None,
        "distribute the target's layers over as many GPUs as they need; needs accelerate (cuda)",
        rule="auto, or None for one device",
        choices=(AUTO,),
    )
    adapter: str | None = option(
        None,
        "merge a LoRA adapter of PEFT or mlx-lm into the target",
        doc="the folder of a LoRA adapter of PEFT or mlx-lm, which is merged into the target; a "
        "drafter of the base model still drafts",
        annotation="str | Path | None",
        rule="the folder of a LoRA adapter",
        metavar="FOLDER",
    )
    bits: int | None = option(
        None,
        "4 and 8 round the target's weights to N bits, which makes it another model; 16 "
        "dequantises weights of few bits (cuda on a CPU)",
        shown="the bits of the checkpoint on a CPU, else 16",
        metavar="auto|4|8|16",
        parse=number_or({AUTO: None}, "bits"),
        accepts=lambda bits: bits in (None, 4, 8, 16),
        rule="auto (None), 4, 8 or 16",
    )
    draft_bits: int | None = option(
        None,
        "quantise the drafter to N bits; 16 leaves it unquantised (mlx; cuda: 4 or 8)",
        1,
        shown="on a Mac's GPU the bits of a quantised target, at least 4; 8 if a target keeps a "
        "GGUF file's bits on a CPU",
    )
    draft_window: int | None = option(
        None,
        f"let the drafter see only the first {SINK} and the last N tokens",
        1,
        shown="all; mlx: 4096",
    )
    memory_gb: float | None = option(
        None,
        "GiB of each GPU to set aside for keys and values, of all sequences together (cuda)",
        shown="most of what the models leave free",
        above=0,
        metavar="GiB",
    )
    kv_bits: int | None = option(None, "quantise the KV cache to N bits (mlx: 4 or 8; cuda: 8)", 1)
    images: bool = option(
        True,
        "do not load the target's vision tower; prompts with images are then refused",
        doc="load the target's vision tower, if it has one that the backend supports; without it, "
        "prompts with images are refused",
        flag="--no-images",
    )
    exact: bool | None = option(
        None,
        "make the target's logits bitwise equal for every method, budget and batch, or fail if "
        "that is impossible (cuda and mlx; default: on for cuda in half precision on a CPU, if "
        "possible)",
        doc="make the target's logits bitwise equal for every method, budget, batch and prompt "
        "chunk (cuda and mlx), or raise an error if that is impossible. None means True for cuda "
        "in half precision on a CPU if it is possible, and False otherwise",
        rule="True, False or None",
    )
    cuda_graphs: bool = option(
        True,
        "do not use CUDA graphs (cuda)",
        doc="run trees and drafts as CUDA graphs (cuda)",
        flag="--no-cuda-graphs",
    )
    wired: bool = option(
        False,
        "keep the models, and 5 GiB more, in memory while the process runs, even if other programs "
        "need it (mlx on a Mac)",
        flag="--wired",
    )
    force: bool = option(
        False,
        "load models that take more memory than macOS recommends for the GPU (mlx on a Mac)",
        flag="--force",
    )
    compile: bool = option(
        False,
        "compile the target's layers with torch.compile, which takes minutes (cuda)",
        flag="--compile",
    )
    threads: int | None = option(
        None,
        "number of threads for computing on a CPU (cuda)",
        1,
        shown="one for each processor that other programs leave free",
    )
    checks: Path | None = None  # the folder of checks that were passed before; None keeps none

    def __post_init__(self) -> None:
        check(self)
        if self.threads is not None and self.threads > (most := most_threads()):
            raise ConfigError(
                f"threads must be at most {most}, the processors that this process may use, got "
                f"{self.threads}"
            )
