"""Systems that answer several prompts at once, and when their tokens arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from treeflash.config import DecodeConfig, Method
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.language_model import LanguageModel

Prompts: TypeAlias = Sequence[list[int]]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One text of a batch.

    Attributes:
        token_ids: the new tokens, the stop token included.
        first_s: from handing over the batch to this text's first token.
        last_s: from handing over the batch to this text's last token.
    """

    token_ids: tuple[int, ...]
    first_s: float
    last_s: float


Run: TypeAlias = Callable[[Prompts, int], list[Answer]]
"""Answers prompts all at once, each with so many tokens at most; the answers are in order."""


class Arrivals:
    """The tokens of a batch and when they arrived."""

    def __init__(self, texts: int) -> None:
        """Start the clock."""
        self.tokens: list[list[int]] = [[] for _ in range(texts)]
        self.times: list[list[float]] = [[] for _ in range(texts)]
        self.started = time.perf_counter()

    def add(self, text: int, tokens: Sequence[int]) -> None:
        """Tokens of a text that are there now."""
        self.tokens[text] += tokens
        self.times[text].append(time.perf_counter() - self.started)

    def answers(self) -> list[Answer]:
        """The finished texts."""
        return [
            Answer(token_ids=tuple(tokens), first_s=times[0], last_s=times[-1])
            for tokens, times in zip(self.tokens, self.times, strict=True)
        ]


def treeflash(model: LanguageModel, method: Method) -> Run:
    """A method of treeflash, through the scheduler."""

    def run(prompts: Prompts, max_tokens: int) -> list[Answer]:
        config = DecodeConfig(
            method=method,
            max_tokens=max_tokens,
            stop_token_ids=frozenset(model.tokenizer.stop_token_ids),
        )
        scheduler = Scheduler(
            model.backend,
            SchedulerConfig(max_parallel=len(prompts)),
            budgets=model.adaptive_budgets,
        )
        arrivals = Arrivals(len(prompts))
        texts = {
            scheduler.submit(Request(prompt_ids=ids, config=config)): number
            for number, ids in enumerate(prompts)
        }
        while scheduler.busy:
            for ticket, event in scheduler.step():
                if isinstance(event, Exception):
                    raise event
                arrivals.add(texts[ticket], event.tokens)
        return arrivals.answers()

    return run


def transformers(model: LanguageModel) -> dict[str, Run]:
    """Padded `generate`, and continuous batching with `generate_batch`."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.streamers import BaseStreamer

    backend: Any = model.backend
    dtype, device = backend.target.dtype, backend.target.device
    stop = sorted(model.tokenizer.stop_token_ids)
    pad = stop[0] if stop else 0
    # A checkpoint's own settings may sample or penalise repetition.
    config = GenerationConfig(do_sample=False, eos_token_id=stop or None, pad_token_id=pad)

    def load() -> Any:
        other = AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype)
        other.generation_config = config
        return other.to(device).eval()

    # Continuous batching replaces a model's attention: each way has a model of its own.
    padded_model, batching_model = load(), load()

    def generate(prompts: Prompts, max_tokens: int) -> list[Answer]:
        class Clock(BaseStreamer):
            """Passes on the tokens of each forward pass, one for each text."""

            prompts_seen = False

            def put(self, value: torch.Tensor) -> None:
                if self.prompts_seen:
                    for text, token in enumerate(value.tolist()):
                        if text not in ended:
                            arrivals.add(text, [token])
                            ended.update([text] if token in stop else [])
                self.prompts_seen = True

            def end(self) -> None:
                pass

        ended: set[int] = set()
        arrivals = Arrivals(len(prompts))
        width = max(map(len, prompts))
        padded = [[pad] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        padded_model.generate(
            torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_tokens,
            streamer=Clock(),
        )
        return arrivals.answers()

    def generate_batch(prompts: Prompts, max_tokens: int) -> list[Answer]:
        # Room for these texts alone: by default it reserves most of the device's memory.
        page = ContinuousBatchingConfig().page_size
        positions = max(map(len, prompts)) + max_tokens
        results = batching_model.generate_batch(
            inputs=list(prompts),
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=len(prompts) * (-(-positions // page) + 1),
                max_batch_tokens=max(2048, sum(map(len, prompts))),
                max_requests_per_batch=len(prompts),
                use_cuda_graph=device.type == "cuda",
            ),
            record_timestamps=True,
            max_new_tokens=max_tokens,
        )
        outputs = list(results.values())
        errors = [output.error for output in outputs if output.error]
        if errors or len(outputs) < len(prompts):
            raise RuntimeError(errors[0] if errors else "some texts were not answered")
        # From the first request, not from the call, which first makes the cache and a thread.
        started = min(output.created_time for output in outputs)
        return [
            Answer(
                token_ids=tuple(output.generated_tokens),
                first_s=output.timestamps[0] - started,
                last_s=output.timestamps[-1] - started,
            )
            for output in outputs
        ]

    return {"generate": generate, "generate_batch": generate_batch}


def mlx_lm(model: LanguageModel) -> dict[str, Run]:
    """mlx-lm's `BatchGenerator`."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.utils import load_model

    backend: Any = model.backend
    other, _ = load_model(model.folder)
    other.set_dtype(getattr(mx, backend.dtype))
    mx.eval(other.parameters())

    def batch_generate(prompts: Prompts, max_tokens: int) -> list[Answer]:
        generator = BatchGenerator(
            other,
            stop_tokens=[[token] for token in sorted(model.tokenizer.stop_token_ids)],
            completion_batch_size=len(prompts),
            prefill_batch_size=len(prompts),
        )
        arrivals = Arrivals(len(prompts))
        uids = generator.insert(list(prompts), [max_tokens] * len(prompts))
        texts = {uid: text for text, uid in enumerate(uids)}
        while responses := generator.next_generated():
            for response in responses:
                arrivals.add(texts[response.uid], [response.token])
        generator.close()
        return arrivals.answers()

    return {"batch_generate": batch_generate}


PEERS: dict[str, tuple[str, Callable[[LanguageModel], dict[str, Run]]]] = {
    "cuda": ("transformers", transformers),
    "mlx": ("mlx-lm", mlx_lm),
}
"""By backend, the package with the same framework."""
SYSTEMS = ("treeflash", *(name for name, _ in PEERS.values()))


def reason(error: Exception) -> str:
    """Why a system cannot run, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
