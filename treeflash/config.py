"""Settings for sampling, decoding and loading: frozen, keyword-only, checked when made."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, get_args

from treeflash.errors import ConfigError

Method = Literal["ar", "dflash", "ddtree", "treeflash", "treeflash-chain"]
METHODS: tuple[Method, ...] = get_args(Method)
Budget = int | Literal["auto"]
HeadRows = int | Literal["auto"] | None
AUTO: Literal["auto"] = "auto"
DTYPES = ("float32", "bfloat16", "float16")
MAX_BUDGET = 1024
"""Nodes; a forward pass over more would cost far more than it could gain, and run out of memory."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the target chooses a token from its logits.

    The temperature applies first, then the filters, each to the tokens that the previous one kept:
    top-k, top-p, min-p.

    Attributes:
        temperature: 0 is greedy (the filters and the seed then have no effect).
        top_k: keep the `top_k` most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens until their mass reaches `top_p`.
        min_p: keep tokens at least `min_p` times as probable as the best one.
        seed: together with a token's absolute position it determines the noise that chooses the
            token, so a seed gives the same text with every method and budget.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(
            _is_number(self.temperature)
            and (self.temperature == 0 or _is_temperature(self.temperature)),
            "temperature must be 0 (greedy), or from 1e-6 to 1e6",
            self,
        )
        _check(is_whole(self.top_k, 0), "top-k must be 0 (off) or more", self)
        _check(
            _is_number(self.top_p) and 0 < self.top_p <= 1,
            "top-p must be above 0 and at most 1",
            self,
        )
        _check(
            _is_number(self.min_p) and 0 <= self.min_p <= 1, "min-p must be between 0 and 1", self
        )
        _check(
            is_whole(self.seed, 0) and self.seed < 2**64,
            "seed must be between 0 and 2**64 - 1",
            self,
        )

    @property
    def greedy(self) -> bool:
        """Whether the target takes its most probable token."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """Changes of the target's logits that depend on the text so far, made before sampling.

    Attributes:
        repetition: divides positive logits, and multiplies negative ones, of tokens that occur in
            the prompt or the generated text (Keskar et al. 2019).
        presence: is subtracted from the logits of tokens that were generated.
        frequency: is subtracted from them as many times as they were generated.
        logit_bias: pairs of a token id and what is added to its logit.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _check(
            _is_number(self.repetition) and 0 < self.repetition < float("inf"),
            "repetition penalty must be above 0",
            self,
        )
        for name in ("presence", "frequency"):
            _check(
                _is_number(getattr(self, name)) and abs(getattr(self, name)) < float("inf"),
                f"{name} penalty must be a finite number",
                self,
            )
        tokens = [token for token, _ in self.logit_bias]
        _check(
            len(set(tokens)) == len(tokens)
            and all(is_whole(token, 0) and _is_number(bias) for token, bias in self.logit_bias),
            "logit_bias must give one number per token id",
            self,
        )

    @property
    def active(self) -> bool:
        """Whether they change anything."""
        return self != Penalties()


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How one text is decoded.

    The defaults of `top_m`, `top_k_children` and `draft_temperature` are the published ones
    (TreeFlash, section 4); `budget` and `head_vocab`, published as 64 and all, were measured
    (docs/performance.md).

    Attributes:
        method: `ar` decodes without drafting; `dflash` verifies the chain of the drafter's best
            tokens, `ddtree` a tree of its marginals, `treeflash` a tree of the AR head's
            predictions, `treeflash-chain` the AR head's best chain.
        budget: nodes of a draft tree including the root, at most 1024; `auto` chooses the size
            that maximises expected tokens per second in every iteration, or turns drafting off.
        top_m: previous-token candidates kept per depth (M).
        top_k_children: children kept per depth and previous token (K).
        head_vocab: how many tokens the AR head scores at most, the most probable of a block; small
            trees need fewer. None is all.
        head_rows: after how many previous tokens it scores them, the most probable of a block;
            None is all M at every depth, `auto` as many as a tree of this budget can use.
        draft_temperature: divides the drafter's logits, and is where the calibration of trees
            begins; it changes the tree, never the output.
        max_tokens: the most new tokens.
        stop_token_ids: tokens that end the text; the one generated is part of the output.
        sampling: how the target chooses.
        penalties: what the text so far adds to the target's logits.
        log_probs: how many of the best tokens' log probabilities to report with each token, beside
            its own; None reports none.
    """

    method: Method = "treeflash"
    budget: Budget = AUTO
    top_m: int = 16
    top_k_children: int = 16
    head_vocab: int | None = 1024
    head_rows: HeadRows = AUTO
    draft_temperature: float = 1.0
    max_tokens: int = 256
    stop_token_ids: frozenset[int] = frozenset()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    penalties: Penalties = field(default_factory=Penalties)
    log_probs: int | None = None

    def __post_init__(self) -> None:
        _check(
            self.method in METHODS,
            f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}",
        )
        _check(
            self.budget == AUTO or (is_whole(self.budget, 1) and self.budget <= MAX_BUDGET),
            f"budget must be auto, or from 1 to {MAX_BUDGET} nodes",
            self,
        )
        _check(is_whole(self.top_m, 1), "top-m must be 1 or more", self)
        _check(is_whole(self.top_k_children, 1), "top-k-children must be 1 or more", self)
        _check(
            self.head_vocab is None or is_whole(self.head_vocab, 1),
            "head-vocab must be 1 or more",
            self,
        )
        _check(
            self.head_rows in (None, AUTO) or is_whole(self.head_rows, 1),
            "head-rows must be auto, or 1 or more",
            self,
        )
        _check(
            _is_number(self.draft_temperature) and _is_temperature(self.draft_temperature),
            "draft-temperature must be from 1e-6 to 1e6",
            self,
        )
        _check(is_whole(self.max_tokens, 1), "max-tokens must be 1 or more", self)
        _check(
            self.log_probs is None or is_whole(self.log_probs, 0),
            "log_probs must be 0 or more, or None",
            self,
        )

    @property
    def drafts(self) -> bool:
        """Whether the method needs a drafter."""
        return self.method != "ar"

    @property
    def drafts_chain(self) -> bool:
        """Whether the method drafts a chain, not a tree."""
        return self.method in ("dflash", "treeflash-chain")

    @property
    def uses_head(self) -> bool:
        """Whether the method needs the drafter's AR head."""
        return self.method.startswith("treeflash")


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Where and how a backend loads its models; it refuses settings that it does not support.

    Attributes:
        device: the backend's own name for a device (`cuda:1`, `cpu`, `gpu`); None is its best.
        dtype: `float32`, `bfloat16` or `float16`; None is the backend's choice for the device.
        draft_bits: bits per weight of the quantised drafter; None does not quantise it.
        device_map: `auto` puts the target's layers on several devices, as many as it needs; None
            is one device.
        draft_window: positions before a draft that the drafter sees, beside the first few; None is
            all.
        kv_bits: bits per number of the target's keys and values; None keeps `dtype`.
        cuda_graphs: on a CUDA device, replay trees and drafts as CUDA graphs.
        compile: compile the target's layers with `torch.compile`.
    """

    device: str | None = None
    dtype: str | None = None
    draft_bits: int | None = None
    device_map: Literal["auto"] | None = None
    draft_window: int | None = None
    kv_bits: int | None = None
    cuda_graphs: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        _check(
            self.device is None or (isinstance(self.device, str) and self.device != ""),
            "device must be the name of a device, such as cpu or cuda:1",
            self,
        )
        _check(
            self.dtype in (None, *DTYPES),
            f"unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}",
        )
        _check(
            self.device_map in (None, AUTO),
            f"unknown device map {self.device_map!r}; the only one is {AUTO}",
        )
        for name in ("draft_bits", "draft_window", "kv_bits"):
            number = getattr(self, name)
            _check(
                number is None or is_whole(number, 1),
                f"{name.replace('_', '-')} must be 1 or more",
                self,
            )


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def is_whole(value: object, least: int) -> bool:
    """Whether `value` is an integer, Python's or NumPy's, of at least `least`."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


def _is_temperature(value: float) -> bool:
    """Whether logits divided by `value` stay finite and distinct."""
    return 1e-6 <= value <= 1e6


def _check(ok: bool, message: str, config: object | None = None) -> None:
    if ok:
        return
    if config is not None:
        name = message.split(" ", 1)[0]
        message += f", got {getattr(config, name.replace('-', '_'))!r}"
    raise ConfigError(message)
