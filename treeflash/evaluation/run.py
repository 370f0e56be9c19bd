"""Decode sets of prompts with every method and budget, and measure drafts by depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from treeflash.cli.console import progress
from treeflash.config import DecodeConfig, Method, Parallel
from treeflash.decoding import Request, Scheduler, Step, check
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.session import draft_anchors
from treeflash.decoding.transitions import TransitionTable
from treeflash.errors import ConfigError, PromptError
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import Row, encode
from treeflash.text.stream import scheduler_config

Source: TypeAlias = Literal["marginal", "corrected"]
SOURCES: tuple[Source, ...] = get_args(Source)
BEST = (1, 2, 5)
METRICS = ("tvd", *(f"top{k}" for k in BEST), *(f"cover{k}" for k in BEST))
"""Metrics of a drafted distribution:

- `tvd`: total variation distance to the target's distribution, 0 to 1;
- `top1`, ...: whether the text's token is among the drafter's top 1, ... tokens;
- `cover1`, ...: the target's probability of the drafter's top 1, ... tokens.
"""


@dataclass
class DepthMetrics:
    """Metrics by depth, summed over anchors, the tokens after which blocks were drafted.

    `anchors` are (D,) numbers of anchors, `sums` (D, len(METRICS)) by source; `corrected` is
    missing without an AR head that has `log_probs`.
    """

    anchors: NDArray[np.int64]
    sums: dict[Source, NDArray[np.float64]] = field(default_factory=dict)

    def __add__(self, other: DepthMetrics) -> DepthMetrics:
        sums = {source: sums + other.sums[source] for source, sums in self.sums.items()}
        return DepthMetrics(self.anchors + other.anchors, sums)

    def records(self) -> Iterator[dict[str, Any]]:
        """Average the mean metrics of each depth with anchors, as `{metric}_{source}`."""
        for i in np.flatnonzero(self.anchors).tolist():
            record: dict[str, Any] = {"depth": i + 1, "anchors": int(self.anchors[i])}
            for n, metric in enumerate(METRICS):
                for source in SOURCES:
                    sums = self.sums.get(source)
                    mean = None if sums is None else float(sums[i, n] / self.anchors[i])
                    record[f"{metric}_{source}"] = mean
            yield record


def measure_depth_metrics(
    backend: Backend, prompt_ids: Sequence[int], text_ids: Sequence[int], temperature: float
) -> DepthMetrics:
    """Draft after every fourth token of the target's own text and compare each depth with it.

    The distributions of a depth have different conditions: the marginal one no token after the
    root, the corrected one the text's previous token, the target's all tokens of the text. The
    temperature applies to the target's distribution; 0 counts as 1.
    """
    assert backend.drafter_config is not None
    assert backend.drafter is not None
    depths = backend.drafter_config.depths
    metrics = DepthMetrics(np.zeros(depths, np.int64))
    for tokens, block, logits in draft_anchors(backend, prompt_ids, text_ids, logits=True):
        assert logits is not None
        n = len(logits)  # the text may end within the block
        target = softmax(logits, temperature)
        drafted = {}
        if backend.drafter_config.has_marginals:
            drafted["marginal"] = backend.drafter.log_probs(block)
        # A head of a user's own need not have the method.
        if backend.head is not None and hasattr(backend.head, "log_probs"):
            previous = np.pad(np.array(tokens[:n], np.int32), (0, depths - n), mode="edge")
            drafted["corrected"] = backend.head.log_probs(block, previous)
        following = np.array(tokens[1 : n + 1], np.int32)
        metrics.anchors[:n] += 1
        for source in SOURCES:
            if source in drafted:
                sums = metrics.sums.setdefault(source, np.zeros((depths, len(METRICS))))
                sums[:n] += _metrics(target, drafted[source][:n], following)
    return metrics


def softmax(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """Return the (n, vocab) probabilities; the temperature 0 counts as 1."""
    scaled = (logits.astype(np.float64) - logits.max(-1, keepdims=True)) / (temperature or 1.0)
    exps = np.exp(scaled)
    normalised: NDArray[np.float64] = exps / exps.sum(-1, keepdims=True)
    return normalised


def _metrics(
    target: NDArray[np.float64], log_probs: NDArray[np.float32], tokens: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Compute the metrics of n depths, (n, len(METRICS)).

    The distributions are (n, vocab), the tokens (n,).
    """
    distance = 0.5 * np.abs(target - np.exp(log_probs)).sum(-1)
    count = min(max(BEST), log_probs.shape[1])
    best = np.argpartition(-log_probs, range(count))[:, :count]
    hits = (best == tokens[:, None]).cumsum(-1)
    mass = np.take_along_axis(target, best, -1).cumsum(-1)
    last = np.minimum(BEST, count) - 1
    return np.column_stack([distance, hits[:, last], mass[:, last]])


Reason: TypeAlias = Literal["candidate", "child", "budget_limit", "block"]
REASONS: tuple[Reason, ...] = get_args(Reason)


def rejection_reason(step: Step) -> Reason | None:
    """Say why the bonus token of an iteration, with its table, was not drafted.

    Returns:
        - `block`: the accepted path reached the last depth;
        - `candidate`: the last token of the path is not among the previous tokens of the next
          depth;
        - `child`: the bonus token is not among the K children of the path's last token;
        - `budget_limit`: the bonus token is in the table, but the tree had no room for it;
        - None: nothing was drafted, the text ended before the bonus token, the accepted path has
          copies of the text that are not in the table, or it reached the token limit, beyond which
          no tree is drafted.
    """
    table = step.table
    if table is None or step.tree is None or step.path is None:
        return None
    if len(step.tokens) < len(step.path):
        return None
    accepted = step.tree.tokens[step.path[1:]].tolist()
    if len(accepted) >= table.depths:
        return None if step.finish_reason == "length" else "block"
    row = 0
    for depth, token in enumerate(accepted):
        if row < 0 or (rank := _rank(table, depth, row, token)) < 0:
            return None
        row = int(table.next_row[depth, row, rank])
    if row < 0:
        return "candidate"
    return "child" if _rank(table, len(accepted), row, step.tokens[-1]) < 0 else "budget_limit"


def _rank(table: TransitionTable, depth: int, row: int, token: int) -> int:
    """Return the rank of a token among the children of a row, -1 if it is none of them."""
    possible = np.isfinite(table.log_probs[depth, row])
    ranks = np.flatnonzero(possible & (table.tokens[depth, row] == token))
    return int(ranks[0]) if len(ranks) else -1


class BestDraft(NamedTuple):
    """Whether the best draft of a depth was the target's token, all tokens before it being drafted.

    On the spine each of these was the best draft of its depth; elsewhere a sibling was accepted.
    """

    depth: int
    on_spine: bool
    right: bool


def best_drafts(step: Step) -> Iterator[BestDraft]:
    """Yield the best drafts along the target's own tokens, whether or not the tree had room."""
    if step.table is None:
        return
    row, on_spine = 0, True
    for depth, token in enumerate(step.tokens[: step.table.depths]):
        best = int(step.table.tokens[depth, row, 0])
        yield BestDraft(depth + 1, on_spine, best == token)
        rank = _rank(step.table, depth, row, token)
        if rank < 0:
            return
        on_spine &= rank == 0
        row = int(step.table.next_row[depth, row, rank])
        if row < 0:
            return


class Case(NamedTuple):
    """A method at a budget."""

    method: Method
    budget: int


Configs: TypeAlias = Mapping[Case, DecodeConfig]


@dataclass(eq=False)
class CaseRun:
    """One case on one prompt so far: new tokens, including the prefill's, and iterations."""

    tokens: int = 0
    accepted_lengths: list[int] = field(default_factory=list)
    rejections: Counter[Reason] = field(default_factory=Counter)
    best_drafts: Counter[BestDraft] = field(default_factory=Counter)

    def add(self, step: Step) -> None:
        self.tokens += len(step.tokens)
        if step.tree is not None:
            self.accepted_lengths.append(len(step.tokens))
        if reason := rejection_reason(step):
            self.rejections[reason] += 1
        self.best_drafts.update(best_drafts(step))


@dataclass(frozen=True)
class Sample:
    """One prompt, decoded in every case.

    The depth metrics are measured on the text of the last case; None without a drafter.
    """

    runs: Mapping[Case, CaseRun]
    depth_metrics: DepthMetrics | None


@dataclass
class Evaluation:
    """The finished prompts by set and number, except those whose text ends with its first token."""

    finished: dict[str, dict[int, Sample]] = field(default_factory=dict)

    @property
    def samples(self) -> dict[str, list[Sample]]:
        """By set that has some, in the order of the file, on which the intervals depend."""
        return {
            name: [found[number] for number in sorted(found)]
            for name, found in self.finished.items()
            if found
        }

    def run(
        self,
        backend: Backend,
        sets: Mapping[str, Sequence[Sequence[int]]],
        configs: Configs,
        console: Console,
        parallel: Parallel = 1,
    ) -> None:
        """Decode every prompt in every case, with a progress bar.

        The cases differ only in method and budget. Budgets are fixed, so that a sequence has the
        same iterations as alone.
        """
        temperature = next(iter(configs.values())).sampling.temperature
        self.finished = {name: {} for name in sets}
        for prompt in decode_prompts(backend, sets, configs, console, parallel):
            sample = prompt.sample(backend, temperature)
            if all(run.accepted_lengths for run in sample.runs.values()):
                self.finished[prompt.set_name][prompt.number] = sample


@dataclass(frozen=True, eq=False)
class DecodedPrompt:
    """A prompt that is being decoded in all cases, or was."""

    set_name: str
    number: int
    ids: Sequence[int]
    runs: Mapping[Case, CaseRun]
    unfinished: set[Case]
    text_ids: list[int] = field(default_factory=list)  # new tokens of the last case

    def sample(self, backend: Backend, temperature: float) -> Sample:
        """Return the results of all runs; the depth metrics are of the last case's text."""
        depth_metrics = None
        if backend.drafter_config is not None:
            depth_metrics = measure_depth_metrics(backend, self.ids, self.text_ids, temperature)
        return Sample(self.runs, depth_metrics)


def decode_prompts(
    backend: Backend,
    sets: Mapping[str, Sequence[Sequence[int]]],
    configs: Configs,
    console: Console,
    parallel: Parallel,
) -> Iterator[DecodedPrompt]:
    """Decode prompts in every case, with a progress bar; yields each when its last run ended."""
    *_, last = configs
    scheduler = Scheduler(backend, scheduler_config(parallel))
    for name, prompts in sets.items():
        for number, ids in enumerate(prompts):
            prompt = DecodedPrompt(
                name, number, ids, {case: CaseRun() for case in configs}, set(configs)
            )
            requests = [
                Request(prompt_ids=ids, config=config, tag=(prompt, case))
                for case, config in configs.items()
            ]
            scheduler.submit_group(requests, raises_limit=True)
    with closing(scheduler.decode()) as steps, progress(console) as bar:
        task = bar.add_task("", total=sum(map(len, sets.values())))
        for request, step in steps:
            prompt, case = request.tag
            prompt.runs[case].add(step)
            if case == last:
                prompt.text_ids.extend(step.tokens)
            if step.finish_reason is not None:
                prompt.unfinished.remove(case)
                if not prompt.unfinished:
                    bar.update(task, description=prompt.set_name)
                    yield prompt
                    bar.advance(task)


def check_max_tokens(max_tokens: int) -> None:
    """Raise a ConfigError for a limit of new tokens that leaves no iteration to measure."""
    if max_tokens < 2:
        raise ConfigError("max_tokens must be 2 or more, because the prefill gives the first token")


def list_cases(methods: Iterable[str], budgets: Iterable[int]) -> list[Case]:
    """List every method at every budget that makes a difference.

    Chains have only the largest budget, because they stop at the end of the block. Plain decoding
    has budget 1. An unknown method raises a ConfigError.
    """
    sizes = sorted(set(budgets))
    cases = []
    for name in dict.fromkeys(methods):
        config = DecodeConfig(method=cast(Method, name))
        useful = sizes if config.speculates else [1]
        cases += [Case(config.method, n) for n in useful[-1 if config.drafts_chain else 0 :]]
    return cases


def encode_rows(model: LanguageModel, rows: Iterable[Row], configs: Configs) -> list[list[int]]:
    """Encode the first turn of each row for all configurations; errors name the row."""
    prompts = []
    for row in rows:
        try:
            prompts.append(encode(model.tokenizer, row.turns[0]).token_ids)
            for config in configs.values():
                check(model.backend, Request(prompt_ids=prompts[-1], config=config))
        except PromptError as error:
            raise PromptError(f"row {row.id!r}: {error}") from None
    return prompts
