"""Decode sets of prompts with every method and budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, cast

from rich.console import Console

from treeflash.cli.progress import progress
from treeflash.config import DecodeConfig, Method
from treeflash.decoding import Request, Scheduler, Step, Ticket, check
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.statistics import Stats
from treeflash.errors import PromptError
from treeflash.evaluation.depth_metrics import DepthMetrics, measure_depth_metrics
from treeflash.evaluation.rejections import Reason, rejection_reason
from treeflash.language_model import LanguageModel
from treeflash.text.many_texts import Parallel, scheduler_config, submit
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
        parallel: Parallel = 1,
    ) -> None:
        """Decode every prompt in every case, with a progress bar.

        Each text is decoded with the fixed budget of its case, so that its iterations are those
        that it would have alone.

        Args:
            backend: a loaded pair.
            sets: token ids of prompts, by name of the set.
            configs: the cases and their configurations; they differ only in method and budget.
            console: for the progress bar.
            parallel: texts to decode at once.

        Raises:
            NumericalError: a model produced values that are not finite.
        """
        finished: dict[str, dict[int, Sample]] = {name: {} for name in sets}
        scheduler = Scheduler(backend, scheduler_config(parallel))
        with progress(console) as bar:
            task = bar.add_task("", total=sum(map(len, sets.values())))
            for prompt in _decode(scheduler, sets, configs):
                bar.update(task, description=prompt.set_name)
                sample = prompt.sample(backend)
                if all(run.accepted_lengths for run in sample.runs.values()):
                    finished[prompt.set_name][prompt.number] = sample
                # The intervals depend on the order.
                self.samples = {
                    name: [own[number] for number in sorted(own)]
                    for name, own in finished.items()
                    if own
                }
                bar.advance(task)


@dataclass(frozen=True, eq=False)
class _Text:
    """A prompt in one case, as far as it is decoded."""

    config: DecodeConfig
    stats: Stats = field(default_factory=Stats)
    rejections: Counter[Reason] = field(default_factory=Counter)
    token_ids: list[int] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """Count a step."""
        self.stats.add(step)
        self.token_ids.extend(step.tokens)
        reason = rejection_reason(step)
        if reason is not None:
            self.rejections[reason] += 1

    def run(self) -> Run:
        """The result."""
        return Run(self.stats.tokens, tuple(self.stats.accepted_lengths), self.rejections)


@dataclass(frozen=True, eq=False)
class _Prompt:
    """A prompt in all cases.

    Attributes:
        set_name: of its set.
        number: in its set.
        ids: its tokens.
        texts: by case.
        unfinished: tickets of the texts that are not finished.
    """

    set_name: str
    number: int
    ids: Sequence[int]
    texts: Mapping[Case, _Text]
    unfinished: set[Ticket] = field(default_factory=set)

    def sample(self, backend: Backend) -> Sample:
        """Compare drafter and target on the text of the last case; returns that and all runs."""
        depth_metrics = None
        if backend.drafter_config is not None:
            *_, last = self.texts.values()
            temperature = last.config.sampling.temperature
            depth_metrics = measure_depth_metrics(backend, self.ids, last.token_ids, temperature)
        return Sample({case: text.run() for case, text in self.texts.items()}, depth_metrics)


def _decode(
    scheduler: Scheduler, sets: Mapping[str, Sequence[Sequence[int]]], configs: Configs
) -> Iterator[_Prompt]:
    """Decode every prompt in every case; yields each prompt when its last text has ended."""
    owners: dict[Ticket, tuple[_Prompt, _Text]] = {}
    for name, prompts in sets.items():
        for number, ids in enumerate(prompts):
            prompt = _Prompt(
                name, number, ids, {case: _Text(config) for case, config in configs.items()}
            )
            requests = [Request(prompt_ids=ids, config=config) for config in configs.values()]
            tickets = submit(scheduler, requests)
            prompt.unfinished.update(tickets)
            for ticket, text in zip(tickets, prompt.texts.values(), strict=True):
                owners[ticket] = prompt, text
    try:
        while scheduler.busy:
            for ticket, event in scheduler.step():
                if isinstance(event, Exception):
                    raise event
                prompt, text = owners[ticket]
                text.add(event)
                if event.finish_reason is not None:
                    prompt.unfinished.remove(ticket)
                    del owners[ticket]
                    if not prompt.unfinished:
                        yield prompt
    finally:
        scheduler.close()


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
