"""The Python API: load a target and its drafter, then generate or stream text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypedDict, Unpack

from treeflash.config import (
    AUTO,
    Budget,
    DecodeConfig,
    HeadRows,
    LoadConfig,
    Method,
    SamplingConfig,
)
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.errors import ConfigError
from treeflash.hub.models import cache_folder, resolve_drafter, resolve_target
from treeflash.registry import best, check_device, loader, on_some_device
from treeflash.text.generation import Generation
from treeflash.text.prompt import Prompt, encode
from treeflash.text.stream import Stream
from treeflash.text.tokenizer import Tokenizer


class Options(TypedDict, total=False):
    """Keywords of `LanguageModel.generate` and `LanguageModel.stream`.

    See `DecodeConfig` and `SamplingConfig` for most of them and their defaults. Two defaults
    depend on the models:

    - `method`: the best that the loaded drafter supports: `treeflash`, else `ddtree`, else `ar`;
    - `stop_token_ids`: the end tokens of the target.

    The others:

    - `stop`: strings to stop at; the text ends before the first of them;
    - `system`: a system message to put before the prompt;
    - `raw`: send a text as it is, without the chat template;
    - `template_args`: extra variables for the chat template. If it has the variable
      `enable_thinking`, that is False by default, because the published drafters were trained
      with thinking off.
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
    stop: str | Sequence[str]
    system: str | None
    raw: bool
    template_args: Mapping[str, Any] | None


@dataclass(frozen=True)
class LanguageModel:
    """A target, its tokenizer and, for drafting, a drafter, ready to generate.

    It may be shared between threads.

    Attributes:
        backend: the loaded pair.
        tokenizer: of the target.
        folder: of the target; None if it was not loaded from one.
        loaded: how the pair was loaded.
        adaptive_budgets: by method, what the budget `auto` has learned so far.
    """

    backend: Backend
    tokenizer: Tokenizer
    folder: Path | None = None
    loaded: LoadConfig = field(default_factory=LoadConfig)
    adaptive_budgets: dict[Method, AdaptiveBudget] = field(
        default_factory=dict, compare=False, repr=False
    )
    _measuring: Lock = field(default_factory=Lock, init=False, compare=False, repr=False)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """Generate the whole text; see `stream`."""
        return self.stream(prompt, **options).run()

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Generate a text chunk by chunk, as the target accepts it.

        Args:
            prompt: a text or messages (dicts with `role` and `content`), which go through the
                chat template, or token ids.
            **options: see `Options`.

        Returns:
            An iterator of chunks; its `generation()` joins them into one result.

        Raises:
            ConfigError: an option is unknown or invalid, or needs a drafter that was not loaded.
            PromptError: the prompt is empty, malformed, too long, or rejected by the chat template.
            NumericalError: while iterating; a model produced values that are not finite.
        """
        stop = options.get("stop", ())
        config = self.decode_config(options)
        prompt_ids = encode(
            self.tokenizer,
            prompt,
            system=options.get("system"),
            raw=options.get("raw", False),
            template_args=options.get("template_args"),
        )
        return Stream(
            self.backend,
            self.tokenizer,
            prompt_ids,
            config,
            (stop,) if isinstance(stop, str) else tuple(stop),
            self._adaptive_budget(config),
        )

    def _adaptive_budget(self, config: DecodeConfig) -> AdaptiveBudget | None:
        """The budget of a method; costs are measured once, for all methods and threads."""
        if config.budget != AUTO or not config.drafts:
            return None
        with self._measuring:
            if config.method not in self.adaptive_budgets:
                known = next(iter(self.adaptive_budgets.values()), None)
                self.adaptive_budgets[config.method] = AdaptiveBudget(
                    known.costs if known else self._costs()
                )
            return self.adaptive_budgets[config.method]

    def _costs(self) -> VerifyCosts:
        if self.folder is None:
            return VerifyCosts.measure(self.backend)
        return VerifyCosts.cached(self.backend, self.folder, self.loaded, cache_folder() / "costs")

    def decode_config(self, options: Options) -> DecodeConfig:
        """The configuration that these options give with this pair.

        Raises:
            ConfigError: an option is unknown or invalid.
        """
        config = parse_options(options)
        return replace(
            config,
            method=options.get("method", self.best_method),
            stop_token_ids=frozenset(options.get("stop_token_ids", self.tokenizer.stop_token_ids)),
        )

    @property
    def best_method(self) -> Method:
        """The default method."""
        if self.backend.drafter_config is None:
            return "ar"
        return "ddtree" if self.backend.head is None else "treeflash"


def load(
    target: str | Path | None = None,
    drafter: str | Path | Literal[False] | None = None,
    *,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    draft_bits: int | None = None,
    kv_bits: int | None = None,
    cuda_graphs: bool = False,
) -> LanguageModel:
    """Load a target and its drafter, fetching them if needed.

    Args:
        target: a local folder or a hub id; None is a small default, SmolLM2-135M-Instruct.
        drafter: a local folder or a hub id; None is the published drafter of the target. False
            loads none: only plain decoding works then.
        backend: name of an installed backend; None is the best one installed.
        device: a device of the backend, such as `cuda:1`, `gpu` or `cpu`; None is the fastest.
        dtype: `float32`, `bfloat16` or `float16`.
        draft_bits: quantise the drafter to so many bits.
        kv_bits: quantise the target's KV cache to so many bits.
        cuda_graphs: run trees in fixed shapes, on a CUDA device as CUDA graphs.

    Raises:
        BackendError: the backend is unknown, not installed, or has no such device.
        CheckpointError: a model is missing or damaged, or the two do not fit.
        UnsupportedModelError: the target's layers cannot run a draft tree.
        ConfigError: a setting is invalid, or the backend does not support it.
    """
    config = LoadConfig(
        device=device, dtype=dtype, draft_bits=draft_bits, kv_bits=kv_bits, cuda_graphs=cuda_graphs
    )
    load_pair = loader(best() if backend is None else backend)
    if device is not None:
        check_device(load_pair, device)
    name = None if target is None else str(target)
    target_folder = resolve_target(name)
    drafter_folder = None
    if drafter is not False:
        drafter_folder = resolve_drafter(None if drafter is None else str(drafter), name)
    tokenizer = Tokenizer.from_folder(target_folder)
    pair = on_some_device(
        lambda config: load_pair(target_folder, drafter_folder, config),
        config,
        named=backend is not None or device is not None,
    )
    return LanguageModel(pair, tokenizer, target_folder, config)


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
        **_pick(given, DecodeConfig), sampling=SamplingConfig(**_pick(given, SamplingConfig))
    )


def _check_kinds(options: Options) -> None:
    """Check the options that no configuration checks."""
    stop_token_ids = options.get("stop_token_ids", ())
    if not isinstance(stop_token_ids, Collection) or not all(
        isinstance(token_id, Integral) for token_id in stop_token_ids
    ):
        raise ConfigError(f"stop_token_ids must be token ids, got {stop_token_ids!r}")
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
