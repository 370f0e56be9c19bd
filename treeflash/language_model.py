"""The Python API: load a target and its drafter, then generate or stream text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypedDict, Unpack

from treeflash.config import AUTO, DecodeConfig, LoadConfig, Method, Parallel, cache_folder
from treeflash.decoding import Scheduler, SchedulerConfig, best_method
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.disk_cache import DiskCache
from treeflash.decoding.interfaces import Backend, ImageProcessor, Loader
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.sampling import Constraint
from treeflash.decoding.suffix import SuffixCache
from treeflash.decoding.verify_costs import VerifyCosts, cost_file, model_key
from treeflash.drafters.folder import read_config
from treeflash.drafters.formats import DRAFTER_SETTINGS
from treeflash.errors import (
    CheckpointError,
    ConfigError,
    PromptError,
    UnsupportedModelError,
    first_line,
)
from treeflash.hub.identity import pair_identity
from treeflash.hub.models import (
    choose_drafter,
    is_converted,
    other_base,
    resolve_drafter,
    resolve_target,
)
from treeflash.hub.published import drafter_training, model_name, published_drafter
from treeflash.hub.sizes import refuse_pair
from treeflash.option import is_whole, options_of
from treeflash.registry import (
    bits_refusal,
    check_config,
    default_backend,
    fall_back_to_cpu,
    loader,
    memory_limit,
    refuse_drafter,
)
from treeflash.text.async_stream import AsyncDecoder, AsyncStream
from treeflash.text.forms import form_of
from treeflash.text.generation import Generation
from treeflash.text.options import (
    OPTIONS,
    Options,
    TextConfig,
    check_names,
    document_options,
    lists_options,
    parse_options,
)
from treeflash.text.prompt import EncodedPrompt, Prompt, encode
from treeflash.text.stream import Assembler, BatchStream, Stream
from treeflash.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from treeflash.text.grammar import GrammarCompiler


@dataclass(frozen=True)
class LanguageModel:
    """A target, its tokenizer and, for drafting, a drafter, ready to generate.

    Threads may share it.

    Attributes:
        folder: the target's folder; None if it was not loaded from one.
        loaded: how the pair was loaded.
        drafter_folder: the drafter's folder; None without a drafter.
        suffix: whether the default method without a drafter is `suffix`, not `ar`.
        adaptive_budgets: for each method, what the budget `auto` has learned so far.
    """

    backend: Backend
    tokenizer: Tokenizer
    folder: Path | None = None
    loaded: LoadConfig = field(default_factory=LoadConfig)
    drafter_folder: Path | None = None
    suffix: bool = False
    adaptive_budgets: AdaptiveBudgets = field(default_factory=AdaptiveBudgets, compare=False)

    def __post_init__(self) -> None:
        if self.folder is not None:
            # A method of the model in its place would keep the model in memory.
            self.adaptive_budgets.measure = partial(_kept_costs, self.folder, self.loaded)

    def __repr__(self) -> str:
        names = ", ".join(f"{key}={name!r}" for key, name in self.names.items())
        backend = self.backend
        return (
            f"LanguageModel({names}, backend={backend.name!r}, device={backend.device!r}, "
            f"dtype={backend.dtype!r})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a loaded model cannot be pickled or copied; call treeflash.load in each process, and "
            "share the model between threads"
        )

    @lists_options(OPTIONS.values())
    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """Generate a whole text.

        Args:
            prompt: a string or messages (dicts with `role` and `content`), which go through the
                chat template, or token ids. A content is a text, or a list of parts: texts
                (`{"type": "text", "text": ...}`) and, if the target takes them, images
                (`{"type": "image", "image": ...}`: a path, bytes, a `data:` URL, or one of Pillow).
            **options: the keywords of `treeflash.text.options.Options`.

        Raises:
            ConfigError: an option is unknown or invalid, or needs a drafter that was not loaded.
            PromptError: the prompt is empty, malformed, too long, or rejected by the chat template;
                or an image cannot be read, or the target takes none.
            NumericalError: a model produced values that are not finite.
        """
        return self.stream(prompt, **options).run()

    @lists_options(OPTIONS.values())
    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Generate a text chunk by chunk, as the target accepts it; see `generate`.

        The `generation()` of the iterator joins its chunks, and its `close()` ends the text early.
        A NumericalError is raised while iterating.
        """
        return Stream(self._prepare(prompt, self.configure(options)), self.adaptive_budgets)

    @lists_options(OPTIONS.values())
    async def agenerate(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """Generate a whole text beside the others of an event loop; see `generate`.

        Texts that are generated at the same time are decoded together, up to 16 at once. A task
        that is cancelled ends its text.
        """
        async with self.astream(prompt, **options) as stream:
            return await stream.run()

    @lists_options(OPTIONS.values())
    def astream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """Generate a text chunk by chunk beside the others of an event loop; see `stream`.

        The first chunk raises what is wrong with the prompt, and a ConfigError if the method needs
        a drafter that was not loaded. Other errors of options are raised at once.
        """
        config = self.configure(options)
        return AsyncStream(partial(self._prepare, prompt, config), self._async_decoder)

    @lists_options(OPTIONS.values())
    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        n: int = 1,
        parallel: Parallel = AUTO,
        **options: Unpack[Options],
    ) -> Iterator[tuple[int, Generation]]:
        """Generate many texts at once: in float32 and exact mode, the texts of `generate`.

        Args:
            prompts: each as for `generate`.
            n: number of answers to each prompt, with the seeds `seed`, `seed + 1`, ...
            parallel: number of sequences to decode at once; `auto` is up to 16, fewer if they would
                need more than 4 GiB of KV cache.
            **options: the keywords of `treeflash.text.options.Options`, for all prompts.

        Returns:
            An iterator of pairs: the index of a prompt and an answer to it, in the order in which
            the answers end. If decoding an answer fails, its error is raised after all others.

        Raises:
            ConfigError, PromptError, NumericalError: see `generate`. The first two are raised
                before anything is decoded; a PromptError names the index of the prompt.
        """
        if not is_whole(n, 1):
            raise ConfigError(f"n must be 1 or more, got {n!r}")
        if isinstance(prompts, str):
            raise PromptError("prompts must be a list of prompts, got a single string")
        text = self.configure(options)
        batch = self.batch_stream(parallel, text.decode)
        numbers: dict[Assembler, int] = {}
        for number, prompt in enumerate(prompts):
            try:
                answers = self.assembler(prompt, text).answers(n)
                batch.submit(answers)
            except PromptError as error:
                raise PromptError(f"prompt {number}: {error}") from None
            numbers |= dict.fromkeys(answers, number)
        return _run_batch(batch, numbers)

    def batch_stream(
        self, parallel: Parallel, config: DecodeConfig, suffix_cache: SuffixCache | None = None
    ) -> BatchStream:
        """Start an empty batch; raises a ConfigError if `parallel` is below 1.

        With a `suffix_cache`, sequences may copy what earlier ones of the batch wrote.
        """
        self._measure_costs(config)
        return BatchStream(self.backend, parallel, self.adaptive_budgets, suffix_cache)

    def scheduler(
        self,
        config: SchedulerConfig,
        prefix_cache: PrefixCache | None,
        suffix_cache: SuffixCache | None = None,
    ) -> Scheduler:
        """Start a scheduler; costs for the budget `auto` are measured now, if not known.

        So is whether the target runs draft trees, as requests may ask for the method `suffix`.
        """
        with suppress(UnsupportedModelError):  # raised again for such requests
            self.backend.check_trees()
        self._measure_costs(self.decode_config({}))
        return Scheduler(
            self.backend,
            config,
            budgets=self.adaptive_budgets,
            prefix_cache=prefix_cache,
            suffix_cache=suffix_cache,
        )

    def disk_cache(self, folder: Path, max_bytes: int) -> DiskCache:
        """Make a disk tier of a prefix cache, for `max_bytes` of states of this pair.

        Raises a ConfigError if the pair has no folder, or its states cannot be stored.
        """
        if self.folder is None or not self.backend.stores_states:
            raise ConfigError(
                "the states of this model cannot be stored on a disk: it was not loaded from a "
                "folder, or its layers are split between processes; remove prefix_cache_dir"
            )
        adapter = None if self.loaded.adapter is None else Path(self.loaded.adapter)
        folders = self.folder, self.drafter_folder, adapter
        memory = cache_folder() / "hashes"
        identity = pair_identity(self.backend, self.loaded, folders, memory)
        return DiskCache(folder, max_bytes, identity)

    @cached_property
    def _async_decoder(self) -> AsyncDecoder:
        return AsyncDecoder(self.backend, self.adaptive_budgets)

    def _prepare(self, prompt: Prompt, config: TextConfig) -> Assembler:
        """Make a sequence that can be decoded at once; raises what `generate` does."""
        assembler = self.assembler(prompt, config)
        self._measure_costs(config.decode)
        return assembler

    def assembler(self, prompt: Prompt, config: TextConfig) -> Assembler:
        """Return a sequence for `Stream` or `BatchStream.submit`; raises what `generate` does."""
        encoded = encode(
            self.tokenizer,
            prompt,
            system=config.system,
            raw=config.raw,
            template_args=config.template_args,
            processor=self.image_processor,
            max_images=config.max_images,
        )
        return self.assemble(encoded, config, self._constraint(config))

    def assemble(
        self,
        prompt: EncodedPrompt,
        config: TextConfig,
        constraint: Callable[[], Constraint] | None,
        **others: Any,
    ) -> Assembler:
        """Return a sequence that begins with an encoded prompt; see `Assembler` for `others`."""
        return Assembler(
            self.backend,
            self.tokenizer,
            tuple(prompt.token_ids),
            config.decode,
            config.stop_strings,
            constraint,
            prompt.images,
            **others,
        )

    @property
    def image_processor(self) -> ImageProcessor | str:
        """Prepares the target's prompts with images; or a sentence says why it takes none."""
        found = self.backend.images
        name = self.names["target"] or "the target"
        return f"{name} takes no images: {found}" if isinstance(found, str) else found

    def _constraint(self, config: TextConfig) -> Callable[[], Constraint] | None:
        """Return a function that makes constraints to the form that options set, or None."""
        if (form := form_of(config)) is None:
            return None
        if not self.tokenizer.stop_token_ids:
            raise ConfigError("json_schema, regex or grammar needs a target with an end token")
        return self.grammars.compile(form)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles grammars for this target, from any thread; needs llguidance."""
        from treeflash.text.grammar import GrammarCompiler

        return GrammarCompiler(self.tokenizer, self.backend.vocab_size)

    @property
    def names(self) -> dict[str, str | None]:
        """The names of the target and the drafter: hub ids, or names of folders."""
        folders = {"target": self.folder, "drafter": self.drafter_folder}
        return {k: None if folder is None else model_name(folder) for k, folder in folders.items()}

    def _measure_costs(self, config: DecodeConfig) -> None:
        """Measure the costs for the budget `auto` now if the configuration needs them."""
        if config.method == "suffix":
            self.backend.check_trees()
        if config.is_adaptive:
            self.adaptive_budgets.get(config.method, self.backend)

    def configure(self, options: Options) -> TextConfig:
        """Make a configuration as `parse_options` does, with this pair's defaults."""
        config = parse_options(options)
        decode = replace(
            config.decode,
            method=options.get("method", self.best_method),
            stop_token_ids=frozenset(options.get("stop_token_ids", self.tokenizer.stop_token_ids)),
        )
        return replace(config, decode=decode)

    def decode_config(self, options: Options) -> DecodeConfig:
        """Make the part of `configure` that decides how the text is decoded."""
        return self.configure(options).decode

    @property
    def best_method(self) -> Method:
        """The best method that the loaded models support."""
        return best_method(self.backend, copies=self.suffix)


# Written by `python -m tests.tables`, like everything between such marks.
# begin LoadOptions
class LoadOptions(TypedDict, total=False):
    """Keywords of `load`."""

    device: str | None
    dtype: str | None
    device_map: Literal["auto"] | None
    adapter: str | Path | None
    bits: int | None
    draft_bits: int | None
    draft_window: int | None
    memory_gb: float | None
    kv_bits: int | None
    images: bool
    exact: bool | None
    cuda_graphs: bool
    wired: bool
    force: bool
    compile: bool
    threads: int | None


# end LoadOptions

document_options(LoadOptions, options_of(LoadConfig).values())


@lists_options(options_of(LoadConfig).values())
def load(
    target: str | Path | None = None,
    drafter: str | Path | Literal[False] | None = None,
    *,
    backend: str | None = None,
    **settings: Unpack[LoadOptions],
) -> LanguageModel:
    """Load a target and its drafter, fetching them if needed.

    Args:
        target: a local folder, a GGUF file, or a hub id; None is a small default,
            SmolLM2-135M-Instruct.
        drafter: a local folder or a hub id; `auto` or None is the published drafter of the target,
            or else the MTP head in the target's folder; `self` is that head. One that cannot be
            used is skipped with a warning. If there is neither, the default method is
            `suffix`, which needs none. False loads no drafter: the default is
            plain decoding, and `suffix` works.
        backend: name of an installed backend; None is the best installed backend.
        **settings: the keywords of `LoadOptions`, which the backend may refuse.

    Raises:
        BackendError: the backend is unknown or not installed, or does not have the device.
        CheckpointError: a model is missing or damaged, or target and drafter do not fit.
        UnsupportedModelError: a drafter was loaded, and the target cannot run a draft tree.
        ConfigError: a setting is unknown or invalid, or the backend does not support it.
    """
    return locate(target, drafter, backend=backend, **settings).load()


@dataclass(frozen=True, kw_only=True)
class LocatedPair:
    """A target and perhaps a drafter, which are on this machine, and how to load them."""

    target: Path
    drafter: Path | None
    thinking: bool  # whether thinking is on in a conversation that does not set it
    loader: Loader
    config: LoadConfig
    named: bool  # whether the user chose the backend or the device
    automatic: bool  # whether the best draft source was to be found, and none was named
    passed_over: bool  # whether a better one was found that cannot be used

    def load(self) -> LanguageModel:
        """Load the models; see `load`."""
        tokenizer = Tokenizer.from_folder(self.target, thinking=self.thinking)
        passed_over, drafter, reason = self.passed_over, self.drafter, ""
        try:
            pair = self._load_pair(drafter)
        except (CheckpointError, UnsupportedModelError) as error:
            if not self.automatic or drafter is None:
                raise
            reason = first_line(error)
        if reason:  # inside `except` the error would keep the first target in memory
            pair = self._load_pair(None)  # raises if the target was the reason
            logging.getLogger(__name__).warning("the drafter in %s is skipped: %s", drafter, reason)
            passed_over, drafter = True, None
        if self.config.exact and pair.inexact:
            raise ConfigError(f"the {pair.name} backend has no exact mode; {pair.inexact}")
        copies = self.automatic and drafter is None
        return LanguageModel(
            pair,
            tokenizer,
            self.target,
            self.config,
            drafter,
            suffix=copies and _can_copy(pair, self.target, passed_over=passed_over),
        )

    def _load_pair(self, drafter: Path | None) -> Backend:
        return fall_back_to_cpu(
            lambda config: self.loader(
                self.target, drafter, replace(config, checks=cache_folder() / "checks")
            ),
            self.config,
            named=self.named,
        )


def locate(
    target: str | Path | None = None,
    drafter: str | Path | Literal[False] | None = None,
    *,
    backend: str | None = None,
    **settings: Unpack[LoadOptions],
) -> LocatedPair:
    """Fetch a target and its drafter if needed, but load neither; see `load`."""
    check_names(settings, ("target", "drafter", "backend", *options_of(LoadConfig)))
    given: dict[str, Any] = dict(settings)
    if given.get("adapter") is not None:
        given["adapter"] = str(given["adapter"])
    config = LoadConfig(**given)
    load_pair = loader(default_backend() if backend is None else backend)
    check_config(load_pair, config, named=backend is not None)
    name = None if target is None else str(target)
    if not config.force and (limit := memory_limit(load_pair)) is not None:
        known = published_drafter(name) if drafter in (None, AUTO) else drafter
        refuse_pair(name, str(known) if known else None, limit)
    refusal = bits_refusal(load_pair, config)
    target_folder = resolve_target(name, packed=refusal is None and config.bits is None)
    if refusal and is_converted(target_folder):
        logging.getLogger(__name__).warning(
            "the weights of %s take 16 bits, because %s", model_name(target_folder), refusal
        )
    target_config = read_config(target_folder)
    if DRAFTER_SETTINGS & target_config.keys():
        raise CheckpointError(
            f"{name} is a drafter, not a target; name it as the drafter (--drafter), and the model "
            "that it drafts for as the target"
        )
    if config.adapter is not None and (base := other_base(Path(config.adapter), target_folder)):
        logging.getLogger(__name__).warning(
            "the adapter in %s was trained for %s, but is merged into %s; the output is right "
            "only if these are the same model",
            config.adapter,
            base,
            model_name(target_folder),
        )
    automatic = drafter in (None, AUTO)
    passed_over, drafter_name, drafter_folder = False, None, None
    if automatic:
        chosen = choose_drafter(
            name, lambda folder: refuse_drafter(load_pair, folder, target_config)
        )
        drafter_name, drafter_folder = chosen.name, chosen.folder
        passed_over = chosen.passed_over
    elif drafter is not False:
        drafter_name = str(drafter)
        drafter_folder = resolve_drafter(drafter_name, name)
    return LocatedPair(
        target=target_folder,
        drafter=drafter_folder,
        thinking=drafter_name is not None and drafter_training(drafter_name, name).thinking,
        loader=load_pair,
        config=config,
        named=backend is not None or config.device is not None,
        automatic=automatic,
        passed_over=passed_over,
    )


def _kept_costs(folder: Path, loaded: LoadConfig, backend: Backend) -> VerifyCosts:
    """Return what passes of a folder's target cost: as an earlier process measured it, or now."""
    file = cost_file(backend, model_key(folder), loaded, cache_folder() / "costs")
    return VerifyCosts.kept(backend, file)


def _can_copy(backend: Backend, target: Path, *, passed_over: bool) -> bool:
    """Return whether a target without a drafter runs draft trees; says what it is decoded with.

    A drafter that was skipped had a line already, which is enough if copies replace it.
    """
    method, reason = "suffix, which copies what the text repeats", ""
    try:
        backend.check_trees()
    except UnsupportedModelError as error:
        method, reason = "ar, without drafts", f": {error}"
    if reason or not passed_over:
        logging.getLogger(__name__).warning(
            "no %s drafter is known for %s; the default method is %s%s",
            "usable" if passed_over else "published",
            model_name(target),
            method,
            reason,
        )
    return not reason


def _run_batch(
    batch: BatchStream, numbers: dict[Assembler, int]
) -> Iterator[tuple[int, Generation]]:
    failure: Exception | None = None
    try:
        while batch.busy:
            for assembler, error in batch.step():
                if error is None:
                    yield numbers[assembler], assembler.generation()
                elif failure is None:
                    failure = error
                    failure.add_note(f"while decoding prompt {numbers[assembler]}")
        if failure is not None:
            raise failure
    finally:
        batch.close()
