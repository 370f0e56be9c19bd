"""Faster `generate` of models that transformers has loaded.

`generate` is a decoding loop for transformers: `model.generate(..., custom_generate=generate)`.
transformers prepares the inputs, the logits processors and the stopping criteria, and treeflash
decodes. Whatever would change the output and is not supported raises a ConfigError, which is a
ValueError.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from treeflash.config import (
    AUTO,
    Budget,
    DecodeConfig,
    LoadConfig,
    Method,
    Penalties,
    SamplingConfig,
    cache_folder,
    later_seed,
)
from treeflash.decoding import Request, Scheduler, SchedulerConfig, Step, best_method
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.image_processor import TOKEN_TYPES
from treeflash.decoding.images import PromptImages
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.verify_costs import VerifyCosts, cost_file
from treeflash.errors import ConfigError, PromptError
from treeflash.hub.models import choose_drafter, resolve_drafter
from treeflash.registry import loader, refuse_drafter
from treeflash.text.tokenizer import check_vocabulary

MODES = ("GREEDY_SEARCH", "SAMPLE")
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
WARPERS = {
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
    "MinPLogitsWarper": "min_p",
}
"""Logits processors of sampling: the attribute, and the setting of `SamplingConfig`."""
REPETITION = "RepetitionPenaltyLogitsProcessor"
ENCODED = "mm_encoder_outputs"
"""The model input with features of images that `generate` has computed."""
PREPARED = ("attention_mask", "position_ids", "cache", "past_key_values", ENCODED)
"""Model inputs that `generate` prepares, which are checked."""
IRRELEVANT = ("use_cache", "logits_to_keep", "cache_position")

Drafter = str | Path | Literal[False] | None


def generate(
    model: Any,
    input_ids: Any,
    logits_processor: Sequence[Any],
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    drafter: Drafter = None,
    method: Method | None = None,
    budget: Budget = AUTO,
    seed: int | None = None,
    **model_kwargs: Any,
) -> Any:
    """Decode with draft trees: a value of `custom_generate`.

    In float32 greedy output is the same as without it. Sampled output has the same distribution.

    Args:
        model: a causal language model of transformers, in PyTorch, on one device; it may have a
            vision tower for images.
        input_ids: (batch, n) token ids, padded on the left.
        logits_processor: of temperature, top-k, top-p, min-p and the repetition penalty.
        stopping_criteria: are asked after every token, without scores.
        generation_config: as transformers completed it.
        synced_gpus: must be False.
        streamer: gets every token. transformers does not hand its own to a callable; see `enable`.
        drafter: a folder or a hub id; None is the published drafter of the model, and False none.
        method: see `treeflash.text.options.Options`; None is the best that the drafter supports,
            and `suffix` without a drafter.
        budget: nodes of a draft tree, or `auto`.
        seed: of the first sequence when sampling, the next has the next; None draws one from
            PyTorch's generator.
        **model_kwargs: inputs of the model; those that transformers prepares.

    Returns:
        (batch, n + m) token ids, or a `GenerateDecoderOnlyOutput` with them.

    Raises:
        ConfigError: an option is not supported or invalid.
        CheckpointError: the drafter is missing, damaged, or does not fit the model; or the model's
            folder has a tokenizer without its vocabulary.
        PromptError: a prompt has no tokens.
        UnsupportedModelError: the model cannot run a draft tree.
    """
    _refuse(model, generation_config, synced_gpus, model_kwargs)
    prompts = _prompts(input_ids, model_kwargs)
    rows = _Rows(input_ids, stopping_criteria, generation_config, streamer)
    if seed is None:
        seed = int(input_ids.new_empty((), device="cpu").random_())
    sampling, penalties = _processing(logits_processor, bool(generation_config.do_sample))
    pair = _pair(model, _drafter_folder(model, drafter))
    images = _images(pair, prompts, model_kwargs)
    limit = pair.backend.max_positions
    if max(map(len, prompts)) + rows.max_tokens > limit:
        warnings.warn(f"sequences end at {limit} tokens, the model's limit", stacklevel=2)
    requests = [
        Request(
            prompt_ids=prompt,
            images=images[number],
            config=DecodeConfig(
                method=method or best_method(pair.backend, copies=True),
                budget=budget,
                max_tokens=rows.max_tokens,
                stop_token_ids=rows.stop_token_ids,
                sampling=SamplingConfig(**sampling, seed=later_seed(seed, number)),
                penalties=penalties,
            ),
            tag=number,
        )
        for number, prompt in enumerate(prompts)
    ]
    _decode(pair, requests, rows)
    if streamer is not None:
        streamer.end()
    sequences = rows.ids[:, : rows.width + rows.length]
    if not generation_config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)


def enable(
    model: Any,
    *,
    drafter: Drafter = None,
    method: Method | None = None,
    budget: Budget = AUTO,
    seed: int | None = None,
) -> None:
    """Let `model.generate` decode with draft trees, also when a library calls it.

    Unlike `custom_generate=generate`, this hands streamers on. See `generate` for the arguments.
    """
    model.generate = partial(
        run, model=model, drafter=drafter, method=method, budget=budget, seed=seed
    )


def disable(model: Any) -> None:
    """Undo `enable`, and free the drafter and what else treeflash keeps with a model."""
    for name in ("generate", PAIRS):
        vars(model).pop(name, None)


def run(
    inputs: Any = None,
    generation_config: Any = None,
    *,
    model: Any,
    streamer: Any = None,
    custom_generate: Any = None,
    drafter: Drafter = None,
    method: Method | None = None,
    budget: Budget = AUTO,
    seed: int | None = None,
    **arguments: Any,
) -> Any:
    """Run `model.generate` with draft trees, as a folder `custom_generate` of the hub does.

    See `generate` for the options, and transformers for the other arguments.
    """
    loop = custom_generate or partial(
        generate, streamer=streamer, drafter=drafter, method=method, budget=budget, seed=seed
    )
    if generation_config is not None and generation_config.stop_strings is not None:
        generation_config = copy(generation_config)
        arguments.setdefault("stop_strings", generation_config.stop_strings)
        generation_config.stop_strings = None
    tokenizer = arguments.get("tokenizer")
    if tokenizer is not None and (strings := arguments.pop("stop_strings", None)) is not None:
        # transformers loses the tokenizer on the way to a callable, and needs it for these strings.
        from transformers import StoppingCriteriaList, StopStringCriteria

        given = arguments.get("stopping_criteria") or ()
        stop = StopStringCriteria(tokenizer, strings)
        arguments["stopping_criteria"] = StoppingCriteriaList([*given, stop])
    return type(model).generate(
        model, inputs, generation_config, streamer=streamer, custom_generate=loop, **arguments
    )


class _Rows:
    """The rows of a batch, which get one token each at a time, as in transformers.

    Rows are decoded at different speeds: a token waits until all other rows have one.
    """

    def __init__(
        self, input_ids: Any, stopping_criteria: Any, generation_config: Any, streamer: Any
    ) -> None:
        """Make the rows before their first tokens, and take the criteria apart."""
        stop: set[int] = set()
        # The criteria of the user, and of `max_time` and `stop_strings`.
        self.criteria = type(stopping_criteria)()
        for one in stopping_criteria:
            if hasattr(one, "eos_token_id"):
                stop.update(one.eos_token_id.flatten().tolist())
            elif not hasattr(one, "max_length"):
                self.criteria.append(one)
        # Tokens that end a row. Without any, rows go on until all have ended.
        self.stop_token_ids = frozenset(stop)
        batch, self.width = input_ids.shape  # tokens of the prompts, with padding
        self.max_tokens = stopping_criteria.max_length - self.width  # new tokens at most
        # (batch, width + max_tokens) tokens of the prompts, with padding, and of the answers
        self.ids = input_ids.new_zeros((batch, self.width + self.max_tokens))
        self.ids[:, : self.width] = input_ids
        pad = generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)  # follows the end of a row
        self.streamer = streamer  # gets the new tokens, unless it is None
        # The tokens of each row; `length` of them are in `ids`.
        self.answers: list[list[int]] = [[] for _ in range(batch)]
        self.complete: set[int] = set()  # rows whose answers do not grow any more
        self.ended: set[int] = set()  # rows that have ended
        self.length = 0  # new tokens in `ids`

    def add(self, row: int, step: Step) -> None:
        """Take the tokens of a step, and write those that all rows have."""
        self.answers[row] += step.tokens
        if step.finish_reason is not None:
            self.complete.add(row)
        while not self.all_ended and all(map(self._has_next, range(len(self.answers)))):
            self._write()

    @property
    def all_ended(self) -> bool:
        return len(self.ended) == len(self.answers)

    def is_padded(self, row: int) -> bool:
        """Return whether a row gets no more tokens."""
        return row in self.ended and bool(self.stop_token_ids)

    def _has_next(self, row: int) -> bool:
        grown = len(self.answers[row]) > self.length
        return grown or row in self.complete or self.is_padded(row)

    def _write(self) -> None:
        column = [
            self.pad if self.is_padded(row) or len(answer) <= self.length else answer[self.length]
            for row, answer in enumerate(self.answers)
        ]
        at = self.width + self.length
        self.ids[:, at] = self.ids.new_tensor(column)
        self.length += 1
        if self.streamer is not None:
            self.streamer.put(self.ids[:, at].cpu())
        self.ended.update(row for row in self.complete if len(self.answers[row]) <= self.length)
        if self.criteria:
            done = self.criteria(self.ids[:, : at + 1], None).tolist()
            self.ended.update(row for row, is_done in enumerate(done) if is_done)


PAIRS = "_treeflash_pairs"
"""The attribute of a model that holds its pairs: they refer to the model, and end with it."""


class _Pairs(dict[Any, Any]):
    """The pairs of a model. They belong to it alone: copies of the model begin without any."""

    def __reduce__(self) -> Any:
        return _Pairs, ()


@dataclass(frozen=True, eq=False)
class _Pair:
    """A model with a drafter, and what the budget `auto` learned."""

    backend: Any
    weights: tuple[int, ...]
    budgets: AdaptiveBudgets


def _kept_costs(config: str, backend: Backend) -> VerifyCosts:
    """Return what passes cost: as an earlier process measured it, or measured now.

    `config` is the model's, as JSON.
    """
    name = f"transformers {config}"  # its weights are not packed, as treeflash's own are
    file = cost_file(backend, name, LoadConfig(), cache_folder() / "costs")
    return VerifyCosts.kept(backend, file)


def _pair(model: Any, drafter: Path | None) -> _Pair:
    """Return the pair of a model and a drafter, which is made at the first call.

    It is made again if weights were moved or replaced meanwhile.
    """
    pairs = vars(model).setdefault(PAIRS, _Pairs())
    weights = tuple(parameter.data_ptr() for parameter in model.parameters())
    pair: _Pair | None = pairs.get(drafter)
    if pair is None or pair.weights != weights:
        check_vocabulary(Path(model.name_or_path))
        backend = inspect.getmodule(loader("cuda"))
        pair = pairs[drafter] = _Pair(
            backend.wrap(model, drafter),  # type: ignore[union-attr]
            weights,
            AdaptiveBudgets(measure=partial(_kept_costs, model.config.to_json_string())),
        )
    return pair


def _drafter_folder(model: Any, drafter: Drafter) -> Path | None:
    """Return a drafter's folder, or None for no drafter; automatic ones are found once."""
    name = model.name_or_path
    if drafter is False or (drafter is None and not name):
        return None
    if drafter is not None:
        return resolve_drafter(str(drafter), name or None)
    pairs = vars(model).setdefault(PAIRS, _Pairs())
    if AUTO not in pairs:
        load, config = loader("cuda"), model.config.to_dict()
        warn = partial(warnings.warn, stacklevel=4)  # names the line that called `generate`
        chosen = choose_drafter(name, lambda folder: refuse_drafter(load, folder, config), warn)
        pairs[AUTO] = chosen.folder
    folder: Path | None = pairs[AUTO]
    return folder


def _decode(pair: _Pair, requests: Sequence[Request], rows: _Rows) -> None:
    """Decode all rows together; equal prompts that follow each other are run once."""
    config = SchedulerConfig(max_parallel=len(requests))
    scheduler = Scheduler(pair.backend, config, budgets=pair.budgets)
    with pair.backend.target.attached():
        first = requests[0].config
        if first.is_adaptive:
            pair.budgets.get(first.method, pair.backend)
        if first.method == "suffix":
            pair.backend.check_trees()
        for _, equal in groupby(requests, lambda x: (x.prompt_ids, x.digests)):
            scheduler.submit_group(list(equal))
        with closing(scheduler.decode()) as steps:
            for request, step in steps:
                rows.add(request.tag, step)
                if rows.all_ended:
                    break
                for other in requests:
                    if rows.is_padded(other.tag):
                        scheduler.cancel(other)


def _refuse(
    model: Any, generation_config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]
) -> None:
    """Raise a ConfigError that names the first option that is not supported."""
    mode = generation_config.get_generation_mode().name
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    implementation = generation_config.cache_implementation
    encoded = model_kwargs.get(ENCODED) or {}
    known = *PREPARED, *IRRELEVANT, *(TOKEN_TYPES if encoded.get("image") is not None else ())
    unknown = [
        name
        for name, value in model_kwargs.items()
        if value is not None and name not in known and not _has_text_only(name, value)
    ]
    problems = {
        "a model in training mode; call model.eval()": model.training,
        f"the generation mode {mode.lower()}": mode not in MODES,
        "synced_gpus": synced_gpus,
        f"cache_implementation {implementation!r}": implementation not in (None, "dynamic"),
        "a cache that is not empty": cache is not None and cache.get_seq_length() > 0,
        **{name: getattr(generation_config, name) for name in OUTPUTS},
        "videos": encoded.get("video") is not None,
        **{f"the model input {name}": True for name in unknown},
    }
    for problem, found in problems.items():
        if found:
            raise ConfigError(f"treeflash does not support {problem}")


def _has_text_only(name: str, value: Any) -> bool:
    """Return whether an input of a model says that all tokens are text."""
    return name in TOKEN_TYPES and not bool(value.any())


def _images(
    pair: _Pair, prompts: Sequence[Sequence[int]], model_kwargs: dict[str, Any]
) -> Sequence[PromptImages | None]:
    """Return the images of each row of a batch, whose features `generate` has computed.

    Raises a ConfigError if the model's images are not supported.
    """
    output = (model_kwargs.get(ENCODED) or {}).get("image")
    if output is None:
        return [None] * len(prompts)
    if isinstance(pair.backend.images, str):
        raise ConfigError("treeflash does not support images of this model type")
    positions, axes = model_kwargs.get("position_ids"), [None] * len(prompts)
    if positions is not None and positions.ndim == 3:
        rows = positions[-3:].int().cpu().numpy().swapaxes(0, 1)
        axes = [row[:, -len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    found: list[PromptImages | None] = pair.backend.target.tower.prompt_images(
        prompts, output, axes
    )
    return found


def _prompts(input_ids: Any, model_kwargs: dict[str, Any]) -> list[list[int]]:
    """Return the tokens of each row of a batch, without padding.

    Raises a ConfigError if padding is not on the left, or positions do not start at 0, and a
    PromptError if a prompt has no tokens.
    """
    if not input_ids.shape[1]:
        raise PromptError("the prompt has no tokens; give some text")
    mask, positions = (model_kwargs.get(name) for name in ("attention_mask", "position_ids"))
    if mask is None:
        mask = input_ids.new_ones(input_ids.shape)
    starts = (mask.cumsum(-1) == 0).sum(-1).tolist()
    if not bool((mask[:, -1] == 1).all()) or mask.sum(-1).tolist() != [
        mask.shape[1] - start for start in starts
    ]:
        raise ConfigError("attention_mask must be ones, after zeros at the left of short prompts")
    expected = mask.cumsum(-1) - 1
    if positions is not None and positions.ndim == 3:
        positions = positions[0]  # positions of text are equal on all axes
    if positions is not None and bool(((positions != expected) & (mask == 1)).any()):
        raise ConfigError("treeflash does not support position_ids that do not count from 0")
    return [ids[start:] for ids, start in zip(input_ids.tolist(), starts, strict=True)]


def _processing(processors: Sequence[Any], do_sample: bool) -> tuple[dict[str, Any], Penalties]:
    """Return `SamplingConfig`'s settings, and penalties; a ConfigError for other processors."""
    settings: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    penalties = Penalties()
    for processor in processors:
        name = type(processor).__name__
        if name in WARPERS:
            settings[WARPERS[name]] = getattr(processor, WARPERS[name])
        elif name == REPETITION and not processor.prompt_ignore_length:
            penalties = Penalties(repetition=processor.penalty)
        elif name != "LogitNormalization":  # normalisation changes no choice
            raise ConfigError(
                f"treeflash does not support the logits processor {name}; remove the option that "
                "adds it"
            )
    return settings, penalties
