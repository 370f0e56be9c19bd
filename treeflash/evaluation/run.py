"""Decode sets of prompts with every method and budget, one prompt at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, cast

from rich.console import Console

from treeflash.cli.progress import progress
from treeflash.config import DecodeConfig, Method
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import check, decode
from treeflash.decoding.statistics import Stats
from treeflash.errors import PromptError
from treeflash.evaluation.depth_metrics import DepthMetrics, measure_depth_metrics
from treeflash.evaluation.rejections import Reason, rejection_reason
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import encode
from treeflash.text.prompt_file import Row


class Case(NamedTuple):
    """A method at a budget."""

    method: Method
    budget: int


Configs: TypeAlias = Mapping[Case, DecodeConfig]


@dataclass(frozen=True)
class Run:
    """The result of one case on one prompt.

    Attributes:
        tokens: new tokens, including that of the prefill.
        accepted_lengths: committed tokens of each iteration.
        rejections: iterations by `rejection_reason`.
    """

    tokens: int
    accepted_lengths: tuple[int, ...]
    rejections: Counter[Reason]


@dataclass(frozen=True)
class Sample:
    """One prompt, decoded by every case.

    Attributes:
        runs: by case.
        depth_metrics: measured on its text; None without a drafter.
    """

    runs: Mapping[Case, Run]
    depth_metrics: DepthMetrics | None


@dataclass
class Evaluation:
    """Collects finished prompts, which survive an interruption.

    Attributes:
        samples: by set. A text that ends with its first token has no iteration and is left out.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def run(
        self,
        backend: Backend,
        sets: Mapping[str, Sequence[Sequence[int]]],
        configs: Configs,
        console: Console,
    ) -> None:
        """Decode every prompt in every case, with a progress bar.

        Args:
            backend: a loaded pair.
            sets: token ids of prompts, by name of the set.
            configs: the cases and their configurations.
            console: for the progress bar.

        Raises:
            NumericalError: a model produced values that are not finite.
        """
        with progress(console) as bar:
            task = bar.add_task("", total=sum(map(len, sets.values())))
            for name, prompts in sets.items():
                bar.update(task, description=name)
                for prompt_ids in prompts:
                    sample = measure(backend, prompt_ids, configs)
                    if all(run.accepted_lengths for run in sample.runs.values()):
                        self.samples.setdefault(name, []).append(sample)
                    bar.advance(task)


def cases(methods: Iterable[str], budgets: Iterable[int]) -> list[Case]:
    """Every method at every budget that matters to it.

    Chains get only the largest budget, because they stop at the end of the block; plain decoding
    has budget 1.

    Raises:
        ConfigError: a method is unknown.
    """
    sizes = sorted(set(budgets))
    found = []
    for name in dict.fromkeys(methods):
        config = DecodeConfig(method=cast(Method, name))
        own = sizes
        if config.drafts_chain:
            own = sizes[-1:]
        elif not config.drafts:
            own = [1]
        found += [Case(config.method, size) for size in own]
    return found


def encode_rows(model: LanguageModel, rows: Iterable[Row], configs: Configs) -> list[list[int]]:
    """The token ids of the first turn of each row, through the chat template.

    Raises:
        PromptError: a prompt cannot be decoded; the message names the row.
        ConfigError: a method needs a drafter, or a head, that was not loaded.
    """
    prompts = []
    for row in rows:
        try:
            prompts.append(encode(model.tokenizer, row.turns[0]))
            for config in configs.values():
                check(model.backend, prompts[-1], config)
        except PromptError as error:
            raise PromptError(f"row {row.id!r}: {error}") from None
    return prompts


def measure(backend: Backend, prompt_ids: Sequence[int], configs: Configs) -> Sample:
    """Decode one prompt in every case, then compare drafter and target on its text.

    Args:
        backend: a loaded pair.
        prompt_ids: the prompt.
        configs: at least one; they differ only in method and budget.
    """
    runs = {}
    for case, config in configs.items():
        stats, rejections, text_ids = Stats(), Counter[Reason](), list[int]()
        for step in decode(backend, prompt_ids, config):
            stats.add(step)
            text_ids += step.tokens
            reason = rejection_reason(step, chain=config.drafts_chain)
            if reason is not None:
                rejections[reason] += 1
        runs[case] = Run(stats.tokens, tuple(stats.accepted_lengths), rejections)
    depth_metrics = None
    if backend.drafter_config is not None:
        temperature = config.sampling.temperature
        depth_metrics = measure_depth_metrics(backend, prompt_ids, text_ids, temperature)
    return Sample(runs, depth_metrics)
