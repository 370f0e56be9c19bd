"""What the methods do on sets of prompts: each prompt decoded by every case before the next."""

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
from treeflash.evaluation.depth_metrics import DepthTotals, measure_depths
from treeflash.evaluation.rejections import Reason, why_lost
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
    """What one case did on one prompt.

    Attributes:
        tokens: new tokens, the prefill's included.
        accepted_lengths: committed tokens of each iteration.
        lost: iterations by the reason why they ended; see `why_lost`.
    """

    tokens: int
    accepted_lengths: tuple[int, ...]
    lost: Counter[Reason]


@dataclass(frozen=True)
class Sample:
    """One prompt, decoded by every case.

    Attributes:
        runs: by case.
        depths: of the text's positions; None without a drafter.
    """

    runs: Mapping[Case, Run]
    depths: DepthTotals | None


@dataclass
class Evaluation:
    """Finished prompts, which no interruption takes back.

    Attributes:
        samples: by set. A text that ends with its first token has no iteration and is no sample.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def run(
        self,
        backend: Backend,
        sets: Mapping[str, Sequence[Sequence[int]]],
        configs: Configs,
        console: Console,
    ) -> None:
        """Decode every prompt in every way, with a progress bar.

        Args:
            backend: a loaded pair.
            sets: by name, the token ids of prompts.
            configs: the ways.
            console: shows the bar.

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
    """Every method at every budget that makes a difference to it.

    A chain gets the largest only, for it stops at the block's end; plain decoding always has 1.

    Raises:
        ConfigError: there is no such method.
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
    """The token ids of what each row's user says first, through the chat template.

    Raises:
        PromptError: names the row that cannot be decoded.
        ConfigError: a method needs what was not loaded.
    """
    prompts = []
    for row in rows:
        try:
            prompts.append(encode(model.tokenizer, row.turns[0]))
            for config in configs.values():
                check(model.backend, prompts[-1], config)
        except PromptError as error:
            raise PromptError(f"the row {row.id!r}: {error}") from None
    return prompts


def measure(backend: Backend, prompt_ids: Sequence[int], configs: Configs) -> Sample:
    """Decode one prompt in every way, then compare drafter and target on its text.

    Args:
        backend: a loaded pair.
        prompt_ids: the prompt.
        configs: the ways, at least one; they differ in method and budget only.
    """
    runs = {}
    for case, config in configs.items():
        stats, lost, text_ids = Stats(), Counter[Reason](), list[int]()
        for step in decode(backend, prompt_ids, config):
            stats.add(step)
            text_ids += step.tokens
            reason = why_lost(step, chain=config.drafts_chain)
            if reason is not None:
                lost[reason] += 1
        runs[case] = Run(stats.tokens, tuple(stats.accepted_lengths), lost)
    depths = None
    if backend.drafter_config is not None:
        depths = measure_depths(backend, prompt_ids, text_ids, config.sampling.temperature)
    return Sample(runs, depths)
