"""Settings for sampling, decoding and loading: frozen, keyword-only, checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, get_args

from treeflash.errors import ConfigError

Method = Literal["ar", "dflash", "ddtree", "treeflash", "treeflash-chain", "suffix"]
METHODS: tuple[Method, ...] = get_args(Method)
Budget = int | Literal["auto"]
HeadRows = int | Literal["auto"] | None
AUTO: Literal["auto"] = "auto"
DTYPES = ("float32", "bfloat16", "float16")
MAX_BUDGET = 1024
"""Nodes of a draft tree. A larger one would cost far more than it could gain, and run out of
memory."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the target samples a token from its logits.

    The temperature applies first. The filters follow in the order top-k, top-p, min-p, each on the
    tokens that the previous filter kept.

    Attributes:
        temperature: 0 takes the most probable token; filters and seed then have no effect.
        top_k: keep the `top_k` most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens until their probabilities add up to `top_p`.
        min_p: keep tokens at least `min_p` times as probable as the most probable one.
        seed: a seed and a token's absolute position determine the noise that samples the token, so
            that a seed gives the same text with every method and budget.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        greedy = _is_number(self.temperature) and self.temperature == 0
        _check(
            self,
            temperature=(
                greedy or _is_temperature(self.temperature),
                "0 (greedy), or from 1e-6 to 1e6",
            ),
            top_k=(is_whole(self.top_k, 0), "0 (off) or more"),
            top_p=(_is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            min_p=(_is_number(self.min_p) and 0 <= self.min_p <= 1, "between 0 and 1"),
            seed=(is_whole(self.seed, 0) and self.seed < 2**64, "between 0 and 2**64 - 1"),
        )

    @property
    def greedy(self) -> bool:
        """Whether the target always takes its most probable token."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """Changes of the target's logits before sampling, which depend on the tokens so far.

    Attributes:
        repetition: factor on the logits of tokens in the prompt or the generated text: positive
            logits are divided by it, negative ones multiplied (Keskar et al. 2019).
        presence: subtracted once from the logit of every token that was generated.
        frequency: subtracted from a token's logit for every time that it was generated.
        logit_bias: pairs of a token id and a number to add to its logit.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not (_is_number(self.repetition) and 0 < self.repetition < math.inf):
            raise ConfigError(f"repetition penalty must be above 0, got {self.repetition!r}")
        for name in ("presence", "frequency"):
            value = getattr(self, name)
            if not (_is_number(value) and abs(value) < math.inf):
                raise ConfigError(f"{name} penalty must be a finite number, got {value!r}")
        tokens = [token for token, _ in self.logit_bias]
        if len(set(tokens)) < len(tokens) or not all(
            is_whole(token, 0) and _is_number(bias) and bias < math.inf
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
    """How one sequence is decoded; `treeflash.text.options.Options` says more about the settings.

    The defaults of `top_m`, `top_k_children` and `draft_temperature` are the published ones
    (TreeFlash, section 4). Those of `budget` and `head_vocab` were measured (docs/history.md);
    published are 64 nodes and the whole vocabulary.

    Attributes:
        method: what trees or chains are drafted from; `ar` decodes without drafting.
        budget: nodes of a draft tree including the root, at most 1024; `auto` chooses the size
            that maximises expected tokens per second in every iteration, or turns drafting off.
        top_m: previous-token candidates per depth (M).
        top_k_children: children per depth and previous token (K).
        head_vocab: number of tokens that the AR head scores; None is the whole vocabulary.
        head_rows: number of previous tokens that the AR head conditions on; None is all M at every
            depth, `auto` as many as a tree of this budget can use.
        suffix: whether trees also have what followed the last tokens where they occurred before.
        draft_depths: depths that the drafter drafts at most; None is all that it has.
        draft_temperature: divides the drafter's logits, and is the start of the calibration.
        calibration: whether trees follow how sharp the drafter's distributions proved to be in the
            text so far; False builds the trees as published.
        max_tokens: maximum number of new tokens.
        stop_token_ids: tokens that end the text; the generated one is part of the output.
        sampling: how the target samples.
        penalties: changes of the target's logits.
        log_probs: number of most probable tokens whose log probabilities are reported with each new
            token and its own; None reports no log probabilities.
    """

    method: Method = "treeflash"
    budget: Budget = AUTO
    top_m: int = 16
    top_k_children: int = 16
    head_vocab: int | None = 1024
    head_rows: HeadRows = AUTO
    suffix: bool = True
    draft_depths: int | None = None
    draft_temperature: float = 1.0
    calibration: bool = True
    max_tokens: int = 256
    stop_token_ids: frozenset[int] = frozenset()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    penalties: Penalties = field(default_factory=Penalties)
    log_probs: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        _check(
            self,
            budget=(
                self.budget == AUTO or (is_whole(self.budget, 1) and self.budget <= MAX_BUDGET),
                f"auto, or from 1 to {MAX_BUDGET} nodes",
            ),
            top_m=(is_whole(self.top_m, 1), "1 or more"),
            top_k_children=(is_whole(self.top_k_children, 1), "1 or more"),
            head_vocab=(self.head_vocab is None or is_whole(self.head_vocab, 1), "1 or more"),
            head_rows=(
                self.head_rows in (None, AUTO) or is_whole(self.head_rows, 1),
                "auto, or 1 or more",
            ),
            suffix=(isinstance(self.suffix, bool), "true or false"),
            draft_depths=(self.draft_depths is None or is_whole(self.draft_depths, 1), "1 or more"),
            draft_temperature=(_is_temperature(self.draft_temperature), "from 1e-6 to 1e6"),
            calibration=(isinstance(self.calibration, bool), "True or False"),
            max_tokens=(is_whole(self.max_tokens, 1), "1 or more"),
            log_probs=(self.log_probs is None or is_whole(self.log_probs, 0), "0 or more, or None"),
        )

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
    """Where and how a backend loads its models. A backend refuses settings that it lacks.

    `treeflash.load` describes the settings.
    """

    device: str | None = None
    dtype: str | None = None
    device_map: Literal["auto"] | None = None
    draft_bits: int | None = None
    draft_window: int | None = None
    kv_bits: int | None = None
    exact: bool | None = None
    cuda_graphs: bool = True
    compile: bool = False
    adapter: str | None = None
    wired: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        _check(
            self,
            device=(
                self.device is None or (isinstance(self.device, str) and self.device != ""),
                "the name of a device, such as cpu or cuda:1",
            ),
            device_map=(self.device_map in (None, AUTO), "auto, or None for one device"),
            adapter=(
                self.adapter is None or (isinstance(self.adapter, str) and self.adapter != ""),
                "the folder of a LoRA adapter",
            ),
            exact=(self.exact is None or isinstance(self.exact, bool), "True, False or None"),
            wired=(isinstance(self.wired, bool), "True or False"),
            draft_bits=(_is_optional_number(self.draft_bits), "1 or more"),
            draft_window=(_is_optional_number(self.draft_window), "1 or more"),
            kv_bits=(_is_optional_number(self.kv_bits), "1 or more"),
        )


def is_whole(value: object, least: int) -> bool:
    """Whether `value` is an integer, Python's or NumPy's, of at least `least`."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def _is_temperature(value: float) -> bool:
    """Whether logits divided by `value` stay finite and distinct."""
    return _is_number(value) and 1e-6 <= value <= 1e6


def _is_optional_number(value: object) -> bool:
    return value is None or is_whole(value, 1)


def _check(config: object, **rules: tuple[bool, str]) -> None:
    """Raise a ConfigError for the first setting whose rule does not hold."""
    for name, (holds, rule) in rules.items():
        if not holds:
            value = getattr(config, name)
            if "or more" in rule and isinstance(value, Real) and not isinstance(value, Integral):
                rule = f"a whole number, {rule}"
            raise ConfigError(f"{name} must be {rule}, got {value!r}")
