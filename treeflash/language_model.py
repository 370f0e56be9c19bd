"""The Python API: load a target and its drafter, then generate or stream text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Literal, Unpack

from treeflash.config import AUTO, DecodeConfig, LoadConfig, Method, is_whole
from treeflash.decoding import Scheduler, SchedulerConfig
from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.errors import ConfigError, PromptError
from treeflash.hub.models import cache_folder, resolve_drafter, resolve_target, training_of
from treeflash.registry import best, check_device, loader, on_some_device
from treeflash.text.assembler import Assembler
from treeflash.text.generation import Generation
from treeflash.text.many_texts import ManyTexts, Parallel
from treeflash.text.options import Options, parse_options, stop_strings
from treeflash.text.prompt import Prompt, encode
from treeflash.text.stream import Stream
from treeflash.text.tokenizer import Tokenizer


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
        config = self.decode_config(options)
        return Stream(
            self.backend,
            self.tokenizer,
            self._encode(prompt, options),
            config,
            stop_strings(options),
            self._adaptive_budget(config),
        )

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        n: int = 1,
        parallel: Parallel = AUTO,
        **options: Unpack[Options],
    ) -> Iterator[tuple[int, Generation]]:
        """Generate many texts at once. In float32 each is the text that it would be alone.

        Args:
            prompts: each as for `stream`.
            n: answers to each prompt, which is run once for those that are decoded together; they
                have the seeds `seed`, `seed + 1`, ...
            parallel: texts to decode at once; `auto` is up to 16, fewer if their keys and values
                would take more than 4 GiB.
            **options: see `Options`; the same for all.

        Returns:
            An iterator of the index of a prompt and an answer to it, in the order in which they
            end. If decoding a text fails, the error is raised after all other texts.

        Raises:
            ConfigError, PromptError, NumericalError: see `stream`. The first two come before
                anything is decoded; a PromptError says which prompt it is.
        """
        if not is_whole(n, 1):
            raise ConfigError(f"n must be 1 or more, got {n!r}")
        if isinstance(prompts, str):
            raise PromptError("prompts must be a list of prompts, got a single string")
        config, stop = self.decode_config(options), stop_strings(options)
        seeds = range(config.sampling.seed, config.sampling.seed + n)
        samplings = [replace(config.sampling, seed=seed) for seed in seeds]
        configs = [replace(config, sampling=sampling) for sampling in samplings]
        texts = self.many_texts(parallel, config)
        numbers: dict[Assembler, int] = {}
        for number, prompt in enumerate(prompts):
            try:
                ids = self._encode(prompt, options)
                group = [Assembler(self.backend, self.tokenizer, ids, x, stop) for x in configs]
                texts.submit(group)
            except PromptError as error:
                raise PromptError(f"prompt {number}: {error}") from None
            numbers |= dict.fromkeys(group, number)
        return _run(texts, numbers)

    def many_texts(self, parallel: Parallel, config: DecodeConfig) -> ManyTexts:
        """No texts yet, to be decoded together with this configuration.

        Raises:
            ConfigError: `parallel` is below 1.
        """
        self._adaptive_budget(config)
        return ManyTexts(self.backend, parallel, self.adaptive_budgets)

    def scheduler(self, config: SchedulerConfig, prefix_cache: PrefixCache | None) -> Scheduler:
        """A scheduler without texts; costs for the budget `auto` are measured now, if needed."""
        self._adaptive_budget(self.decode_config({}))
        return Scheduler(
            self.backend, config, budgets=self.adaptive_budgets, prefix_cache=prefix_cache
        )

    def assembler(self, prompt: Prompt, options: Options) -> Assembler:
        """A text for `ManyTexts.submit`; raises what `stream` does."""
        return Assembler(
            self.backend,
            self.tokenizer,
            self._encode(prompt, options),
            self.decode_config(options),
            stop_strings(options),
        )

    def _encode(self, prompt: Prompt, options: Options) -> list[int]:
        return encode(
            self.tokenizer,
            prompt,
            system=options.get("system"),
            raw=options.get("raw", False),
            template_args=options.get("template_args"),
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
    device_map: Literal["auto"] | None = None,
    draft_bits: int | None = None,
    draft_window: int | None = None,
    kv_bits: int | None = None,
    cuda_graphs: bool = True,
    compile: bool = False,
) -> LanguageModel:
    """Load a target and its drafter, fetching them if needed.

    Args:
        target: a local folder or a hub id; None is a small default, SmolLM2-135M-Instruct.
        drafter: a local folder or a hub id; `auto` or None is the published drafter of the target.
            False loads none: only plain decoding works then.
        backend: name of an installed backend; None is the best one installed.
        device: a device of the backend, such as `cuda:1`, `gpu` or `cpu`; None is the fastest.
        dtype: `float32`, `bfloat16` or `float16`.
        device_map: `auto` puts the target's layers on several devices.
        draft_bits: quantise the drafter to so many bits.
        draft_window: the drafter sees only the first few and so many of the latest positions.
        kv_bits: quantise the target's KV cache to so many bits.
        cuda_graphs: on a CUDA device, replay trees and drafts as CUDA graphs.
        compile: compile the target's layers with `torch.compile`.

    Raises:
        BackendError: the backend is unknown, not installed, or has no such device.
        CheckpointError: a model is missing or damaged, or the two do not fit.
        UnsupportedModelError: the target's layers cannot run a draft tree.
        ConfigError: a setting is invalid, or the backend does not support it.
    """
    config = LoadConfig(
        device=device,
        dtype=dtype,
        device_map=device_map,
        draft_bits=draft_bits,
        draft_window=draft_window,
        kv_bits=kv_bits,
        cuda_graphs=cuda_graphs,
        compile=compile,
    )
    load_pair = loader(best() if backend is None else backend)
    if device is not None:
        check_device(load_pair, device)
    name = None if target is None else str(target)
    target_folder = resolve_target(name)
    drafter_folder, thinking = None, False
    if drafter is not False:
        drafter_name = None if drafter is None else str(drafter)
        drafter_folder = resolve_drafter(drafter_name, name)
        thinking = training_of(drafter_name, name).thinking
    tokenizer = Tokenizer.from_folder(target_folder, thinking=thinking)
    pair = on_some_device(
        lambda config: load_pair(target_folder, drafter_folder, config),
        config,
        named=backend is not None or device is not None,
    )
    return LanguageModel(pair, tokenizer, target_folder, config)


def _run(texts: ManyTexts, numbers: dict[Assembler, int]) -> Iterator[tuple[int, Generation]]:
    """See `LanguageModel.generate_many`."""
    failure: Exception | None = None
    try:
        while texts.busy:
            for text, error in texts.step():
                if error is None:
                    yield numbers[text], text.generation()
                elif failure is None:
                    failure = error
                    failure.add_note(f"while decoding prompt {numbers[text]}")
        if failure is not None:
            raise failure
    finally:
        texts.close()
