"""Diagnose a pair: each check changes one setting and measures whether drafts improve."""

from __future__ import annotations

import gc
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, starmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.config import MAX_BUDGET, DecodeConfig, size_text
from treeflash.decoding import Request, decode
from treeflash.decoding.interfaces import ARHead, Backend, DeviceReport, device_report
from treeflash.decoding.session import draft_anchors
from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.evaluation import read_evaluation
from treeflash.drafters.folder import is_quantised, read_config, weight_files
from treeflash.drafters.formats import SPECULATORS, detect_format, replace_settings, unknown_keys
from treeflash.errors import CheckpointError, NumericalError, PromptError
from treeflash.text.prompt import Message, Prompting
from treeflash.text.tokenizer import Tokenizer

SIDE = 512
"""Pixels of the side of an image whose tokens are counted."""
SIGNIFICANT = 3.0
"""Standard errors from which a gain is not noise."""


Answered: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""A prompt and the target's greedy answer to it, as token ids."""


@dataclass(frozen=True, eq=False)
class TokenScores:
    """(blocks, D) scores of the target's tokens; nan after the end of a text.

    `log_probs` are their log probabilities, nats; `hits` are 1 for the drafter's most probable
    token.
    """

    log_probs: NDArray[np.float64]
    hits: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DrafterScores:
    """A drafter's scores on some blocks, computed in four ways."""

    marginal: TokenScores  # each row of a block, compared with the token at the depth of the row
    earlier: TokenScores  # each row, compared with the token one depth earlier
    later: TokenScores  # each row, compared with the token one depth later
    texts: NDArray[np.int64]  # (blocks,) index of the text of each block
    # the rows of the AR head after the target's previous tokens; None if not requested
    corrected: TokenScores | None = None

    def compare(self, other: TokenScores) -> Gain:
        """Return the gain of other scores of these blocks over the marginal scores."""
        return Gain.between(self.marginal.log_probs, other.log_probs)

    def text_means(self, count: int) -> NDArray[np.float64]:
        """Average each text's marginal log probability, (count, 1); nan without a block."""
        texts = (self.marginal.log_probs[self.texts == number] for number in range(count))
        return np.array([[_mean(text)] for text in texts])


@dataclass(frozen=True)
class Gain:
    """How much more probable the target's tokens are with one way of drafting than with another.

    `nats` is the mean difference of log probabilities, `error` its standard error.
    """

    nats: float
    error: float

    @classmethod
    def between(cls, base: NDArray[np.float64], other: NDArray[np.float64]) -> Gain:
        """Compare (blocks, depths) log probabilities with `base`; nan is ignored."""
        difference = other - base
        difference = difference[~np.isnan(difference).all(1)]
        if len(difference) < 2:
            return cls(0.0, math.inf)
        means = np.nanmean(difference, 1)
        return cls(float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means))))

    def is_clear(self, least: float) -> bool:
        """Return whether the gain is statistically significant and at least `least` nats."""
        return self.nats >= max(least, SIGNIFICANT * self.error)

    def __str__(self) -> str:
        return f"{math.exp(self.nats):.2f}x"


def answer(
    backend: Backend, prompt_ids: Sequence[int], max_tokens: int, stop_token_ids: frozenset[int]
) -> Answered:
    """Decode an answer without drafting."""
    config = DecodeConfig(method="ar", max_tokens=max_tokens, stop_token_ids=stop_token_ids)
    steps = decode(backend, Request(prompt_ids=prompt_ids, config=config))
    return prompt_ids, [token for step in steps for token in step.tokens]


def measure(
    backend: Backend, texts: Sequence[Answered], head: ARHead | None = None
) -> DrafterScores:
    """Score the tokens after every fourth token of some texts; a PromptError if they are short."""
    assert backend.drafter is not None
    rows: dict[str, list[NDArray[np.float64]]] = {}
    numbers: list[int] = []
    for number, (prompt_ids, answer_ids) in enumerate(texts):
        for tokens, block, _ in draft_anchors(backend, prompt_ids, answer_ids):
            marginal = backend.drafter.log_probs(block)
            tables = {"marginal": (marginal, 1), "earlier": (marginal, 0), "later": (marginal, 2)}
            if head is not None:
                previous = np.resize(np.array(tokens, np.int32), len(marginal))
                tables["corrected"] = head.log_probs(block, previous), 1
            for name, (table, first) in tables.items():
                rows.setdefault(name, []).append(_score(table, tokens[first:]))
            numbers.append(number)
    if not numbers:
        raise PromptError(
            "the target's answers are too short to score a drafter; raise --max-tokens, or use "
            "other prompts"
        )
    scores = {name: TokenScores(*np.stack(blocks, 1)) for name, blocks in rows.items()}
    return DrafterScores(texts=np.array(numbers), **scores)


def depth_means(values: NDArray[np.float64]) -> list[float]:
    """Average over the blocks, for each depth that the texts reach."""
    reached = ~np.isnan(values).all(0)
    return [float(mean) for mean in np.nanmean(values[:, reached], 0)]


def _score(table: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    """Return (2, D) log probabilities and hits of tokens in (D, vocab) rows, one token per row."""
    if np.isnan(table).any():
        raise NumericalError("the drafter's output is not a number (NaN): its weights are damaged")
    count = min(len(table), len(tokens))
    expected = np.array(tokens[:count], np.int64)
    scores = np.full((2, len(table)), np.nan)
    scores[0, :count] = table[np.arange(count), expected]
    scores[1, :count] = table[:count].argmax(-1) == expected
    return scores


MIN_GAIN = 0.1
"""Smallest gain that matters on the same texts, nats: tokens become 1.1 times as probable."""
MIN_PROMPTING_GAIN = 0.5
"""Another way of prompting changes the texts, which alone makes a difference."""
COLLAPSE = 2.0
"""Nats lost from one depth to the next, a factor of 7. Sound drafters lose at most 1."""
LEAST_TEXTS = 3
"""Least texts that tell whether agreement collapses."""
SOUND = 0.3
"""Least agreement before a collapse: less may end by chance."""
CHANCE = 0.1
"""Agreement that guesses of frequent tokens nearly reach."""
MASK_CANDIDATES, ALL_MASK_CANDIDATES = 3, 8
"""Other mask tokens to try, and more of them in a thorough diagnosis: each loads the drafter."""
MAX_CONTEXT, USEFUL_CONTEXT = 1 << 20, 4096
"""Tokens of the longest context that is asked about, and tokens that should fit."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check; the message has the measurement and, for a problem, the remedy."""

    check: str
    ok: bool = True
    message: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Alternatives to one setting, each with its gain; None if the pair cannot run with it.

    `least` is the smallest gain that matters, nats.
    """

    check: str
    gains: Mapping[str, Gain | None]
    least: float

    def best(self) -> tuple[str, Gain] | None:
        """Return the alternative with the largest gain; None if there is none."""
        gains = {name: gain for name, gain in self.gains.items() if gain is not None}
        return max(gains.items(), key=lambda item: item[1].nats, default=None)

    def finding(self, least: float) -> Finding:
        """Return the outcome, where a gain counts from `least` nats."""
        best = self.best()
        if best is None:
            return Finding(check=self.check, message="no alternative to try")
        name, gain = best
        if gain.is_clear(least):
            message = f"{name}: the target's tokens are {gain} as probable"
            return Finding(check=self.check, ok=False, message=message)
        noise = ", within noise" if gain.nats > 0 and not gain.is_clear(-math.inf) else ""
        message = f"no significant improvement (best alternative: {name}, {gain}{noise})"
        return Finding(check=self.check, message=message)


def findings(trials: Sequence[Trial]) -> list[Finding]:
    """Say for each trial whether an alternative is clearly better than the present setting.

    If one setting is badly wrong, changes of other settings help a little by accident. So gains of
    less than half the largest gain do not count.
    """
    bests = [(trial, best[1]) for trial in trials if (best := trial.best())]
    largest = max((gain.nats for trial, gain in bests if gain.is_clear(trial.least)), default=0.0)
    return [trial.finding(max(trial.least, largest / 2)) for trial in trials]


Alternatives: TypeAlias = dict[str, Mapping[str, Mapping[str, object]]]
"""By check, other values for one setting by name, as `replace_settings` takes them."""


def list_alternatives(
    config: DrafterConfig,
    drafter: Mapping[str, Any],
    target: Mapping[str, Any],
    masks: Mapping[int, str],
) -> Alternatives:
    """List other values for the settings of a drafter that may be wrong.

    `masks` names tokens that may be the mask, by id. The `config.json` of the target is empty if
    unknown.
    """
    layers = [[i + step for i in config.target_layer_ids] for step in (-1, 1)]
    layer_ids = {f"target_layer_ids {ids}": {"target_layer_ids": ids} for ids in layers}
    tokens = {f"mask_token_id {i} ({name})": {"mask_token_id": i} for i, name in masks.items()}
    found: Alternatives = {"target layers": layer_ids, "mask token": tokens}
    windows = zip(config.sliding_windows, config.causal, strict=True)
    if sliding := [causal for window, causal in windows if window is not None]:
        other = not sliding[0]
        found["causal block"] = {f"is_causal {other}": {"is_causal": other}}
    gemma = str(target.get("model_type")).startswith("gemma")
    if gemma and detect_format(drafter) is not SPECULATORS:
        scale = 1.0 if config.input_scale != 1 else config.hidden_size**0.5
        scaled = {"input_embedding_scale": scale}
        found["embedding scale"] = {f"input_embedding_scale {scale:g}": scaled}
    return found


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The outcome of all checks.

    `marginal` and `corrected` are, by depth, the fraction of blocks whose top token is the
    target's, without the AR head and with it; None without a block drafter, or without a head.
    `evaluation` has such fractions of the drafter's own evaluation; None without one.
    """

    marginal: list[float] | None
    corrected: list[float] | None
    findings: list[Finding]
    evaluation: list[float] | None = None

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def diagnose(
    load: Callable[[Path], Backend],
    folder: Path,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    *,
    prompting: Prompting,
    max_tokens: int = 64,
    target_config: Mapping[str, Any] | None = None,
    thorough: bool = False,
    report: Callable[[int, int, str], None] = lambda number, total, check: None,
    begin: Callable[[Diagnosis], None] = lambda diagnosis: None,
) -> Diagnosis:
    """Run all checks on a pair, whose drafter is loaded about six times, one after the other.

    `load` gives the target the drafter of a folder, in place of the last one. The drafter is scored
    on the target's greedy answers to `prompts`. A `thorough` diagnosis tries more tokens as the
    mask. `begin` gets what the first load shows; then `report` gets the number of each check of a
    setting, how many there are, and what is checked.

    Raises a PromptError if a prompt cannot be decoded or the answers are too short, and a
    NumericalError if a model produced values that are not finite.
    """
    pair = _measure_pair(load(folder), tokenizer, prompts, prompting, max_tokens)
    scores, config = pair.scores, pair.config

    def change(settings: Mapping[str, object]) -> Gain | None:
        """Return the gain of other drafter settings; None if the pair cannot run with them."""
        gc.collect()  # frees the previous pair: memory may fit only one
        with TemporaryDirectory() as scratch:
            write_changed(folder, Path(scratch), settings)
            try:
                changed = measure(load(Path(scratch)), pair.texts)
            except (CheckpointError, NumericalError):
                return None
        return scores.compare(changed.marginal)

    drafter, target = read_config(folder), target_config or {}
    evaluation = read_evaluation(folder)
    measured = Diagnosis(
        marginal=depth_means(scores.marginal.hits),
        corrected=depth_means(scores.corrected.hits) if scores.corrected else None,
        findings=[
            check_depths(scores),
            *check_keys(drafter),
            *check_precision(target),
            *pair.device,
        ],
        evaluation=None if evaluation is None else list(evaluation.by_depth),
    )
    begin(measured)
    limit = ALL_MASK_CANDIDATES if thorough else MASK_CANDIDATES
    masks = mask_candidates(tokenizer, config.mask_token_id, pair.vocab_size, limit)
    alternatives = list_alternatives(config, drafter, target, masks)
    total = sum(len(values) for values in alternatives.values())
    numbers = count(1)

    def trial(check: str, values: Mapping[str, Mapping[str, object]]) -> Trial:
        gains = {}
        for name, settings in values.items():
            report(next(numbers), total, check)
            gains[name] = change(settings)
        return Trial(check=check, gains=gains, least=MIN_GAIN)

    rows = {"i - 1": scores.earlier, "i + 1": scores.later}
    trials = [
        Trial(
            check="block offset",
            gains={
                f"row i of the block taken for depth {depth}": scores.compare(shifted)
                for depth, shifted in rows.items()
            },
            least=MIN_GAIN,
        ),
        Trial(check="prompting", gains=pair.prompted, least=MIN_PROMPTING_GAIN),
        *starmap(trial, alternatives.items()),
    ]
    depths, *facts = measured.findings
    return replace(measured, findings=[depths, *findings(trials), *facts])


def diagnose_target(backend: Backend, target_config: Mapping[str, Any], drafter: str) -> Diagnosis:
    """Check what does not depend on a block drafter.

    Args:
        backend: has the loaded models.
        target_config: the target's `config.json`.
        drafter: what drafts, and what measures it.
    """
    findings = [
        Finding(check="drafter", message=drafter),
        *check_precision(target_config),
        *check_device(backend),
        check_exact_mode(backend),
        check_images(backend),
    ]
    return Diagnosis(marginal=None, corrected=None, findings=findings)


def check_device(backend: Backend) -> list[Finding]:
    """Report on the machine and its kernels, and whether models and a context fit."""
    report = device_report(backend)
    findings = check_facts(report)
    if (free := report.free_bytes) is not None:
        findings.append(_memory_finding(backend, report.weights_bytes, free))
    if not report.batches:
        message = "sequences run one by one, because this model's logits differ in a batch"
        findings.append(Finding(check="batches", message=message))
    return [*findings, *check_kernels(report)]


def check_facts(report: DeviceReport) -> list[Finding]:
    """Check a finding that lists facts about the machine, if there are any."""
    if not report.facts:
        return []
    message = ", ".join(f"{name}: {fact}" for name, fact in report.facts.items())
    return [Finding(check="device", message=message)]


def check_kernels(report: DeviceReport) -> list[Finding]:
    return [
        Finding(check="kernel", message=f"{kernel}: {'; '.join(map(' '.join, verdicts.items()))}")
        for kernel, verdicts in report.kernels.items()
    ]


def check_exact_mode(backend: Backend) -> Finding:
    """Check whether texts depend on drafts or other sequences in any bit."""
    message = backend.inexact or "exact: no token depends on drafts or on other sequences"
    return Finding(check="exact mode", message=message)


def check_images(backend: Backend) -> Finding:
    """Report whether the target takes images, and how many tokens one has; or why not."""
    processor = backend.images
    if isinstance(processor, str):
        message = f"prompts with images are refused: {processor}"
    else:
        picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        _, images = processor.encode(processor.placeholder, [picture])
        message = f"taken; one of {SIDE} x {SIDE} pixels is {images.is_feature.sum()} tokens"
    return Finding(check="images", message=message)


def _memory_finding(backend: Backend, weights: int, free: int) -> Finding:
    """Return whether a context fits into the memory that the weights leave free."""
    drafts = backend.drafter_config is not None

    def nbytes(positions: int) -> int:
        return backend.state_nbytes(positions + MAX_BUDGET, drafts=drafts)

    longest = min(backend.max_positions, MAX_CONTEXT)
    fitting = bisect_right(range(longest), free, key=lambda n: nbytes(n + 1))
    message = f"the models take {size_text(weights)} and leave {size_text(free)}, "
    if fitting == longest:
        message += f"enough for a context of {longest} tokens ({size_text(nbytes(longest))})"
    else:
        message += f"enough for a context of {fitting} of {longest} tokens"
    ok = fitting >= min(longest, USEFUL_CONTEXT)
    if not ok:
        message += "; use a smaller model or fewer bits"
    return Finding(check="memory", ok=ok, message=message)


def check_keys(config: Mapping[str, Any]) -> list[Finding]:
    """List the ignored keys of a drafter's configuration, if there are any."""
    if not (ignored := unknown_keys(config)):
        return []
    message = f"config.json has unknown keys, which were ignored: {', '.join(ignored)}"
    return [Finding(check="config keys", message=message)]


def check_precision(target_config: Mapping[str, Any]) -> list[Finding]:
    """Report a quantised target, because drafters were trained on one that is not."""
    if not is_quantised(target_config):
        return []
    message = (
        "the target is quantised; a drafter that was trained on the unquantised target may be "
        "accepted less often here"
    )
    return [Finding(check="precision", message=message)]


def check_depths(scores: DrafterScores) -> Finding:
    """Check that drafts agree at depth 1 at all, and do not collapse between depths."""
    for name, rows in (("drafter", scores.marginal), ("AR head", scores.corrected)):
        if rows and (problem := _collapse(rows, scores.texts, name)):
            return Finding(check="depths", ok=False, message=problem)
    return Finding(check="depths", message="agreement does not collapse at any depth")


def mask_candidates(
    tokenizer: Tokenizer, current: int, vocab_size: int, limit: int = MASK_CANDIDATES
) -> dict[int, str]:
    """Return other tokens that may be the mask, by id; the most plausible names come first."""
    names = {token_id: tokenizer.token_text(token_id) for token_id in tokenizer.special_token_ids}
    names[tokenizer.size] = "mask: the first id after the tokenizer's"
    likely = sorted(names, key=lambda token_id: (_rank(names[token_id]), token_id))
    usable = [i for i in likely if i != current and i < vocab_size]
    return {token_id: names[token_id] for token_id in usable[:limit]}


def write_changed(folder: Path, copy: Path, settings: Mapping[str, object]) -> None:
    """Write a copy of a drafter's folder with other settings, and links to the weights."""
    config = replace_settings(read_config(folder), settings)
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in weight_files(folder):
        (copy / file.name).symlink_to(file.resolve())


class _Pair(NamedTuple):
    """Measurements of the unchanged pair, without its models, which would take memory."""

    config: DrafterConfig
    vocab_size: int
    texts: list[Answered]
    scores: DrafterScores
    prompted: dict[str, Gain | None]
    device: list[Finding]


def _measure_pair(
    backend: Backend,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    prompting: Prompting,
    max_tokens: int,
) -> _Pair:
    assert backend.drafter_config is not None

    def answers(way: Prompting) -> list[Answered]:
        prompt_ids = [way.encode(tokenizer, prompt) for prompt in prompts]
        return [answer(backend, ids, max_tokens, tokenizer.stop_token_ids) for ids in prompt_ids]

    texts = answers(prompting)
    scores = measure(backend, texts, backend.head)
    prompted: dict[str, Gain | None] = {}
    for way in prompting.alternatives(tokenizer):
        try:
            other = measure(backend, answers(way))
        except PromptError:  # a template may reject a system message
            continue
        means = (s.text_means(len(prompts)) for s in (scores, other))
        prompted[str(way)] = Gain.between(*means)
    config = backend.drafter_config
    device = [*check_device(backend), check_exact_mode(backend), check_images(backend)]
    assert isinstance(config, DrafterConfig)  # the command refuses other drafters
    return _Pair(config, backend.vocab_size, texts, scores, prompted, device)


def _mean(x: NDArray[np.float64]) -> float:
    """Average what is not nan; nan if nothing is."""
    x = x[~np.isnan(x)]
    return float(x.mean()) if x.size else math.nan


def _collapse(scores: TokenScores, texts: NDArray[np.integer], name: str) -> str | None:
    """Return what is wrong with the agreement by depth; None if nothing is.

    `texts` has the text of each block. Blocks of one text are alike, so texts are compared.
    """
    by_text = [scores.log_probs[texts == text] for text in np.unique(texts)]
    hits = depth_means(scores.hits)
    if hits[0] < CHANCE:
        return (
            f"the {name}'s top token at depth 1 matches the target in {hits[0]:.0%} of cases, no "
            "better than chance; if no other check explains it, the drafter is for another target"
        )
    for depth in range(1, len(hits)):
        if hits[depth - 1] < SOUND or max(hits[depth:]) >= CHANCE:
            continue
        here, next_ = (
            np.array([[_mean(rows[:, d])] for rows in by_text]) for d in (depth - 1, depth)
        )
        is_told = np.count_nonzero(~np.isnan(next_)) >= LEAST_TEXTS
        if is_told and Gain.between(next_, here).is_clear(COLLAPSE):
            return (
                f"the {name}'s agreement falls from {hits[depth - 1]:.0%} at depth {depth} to "
                f"{hits[depth]:.0%} at depth {depth + 1}; if the drafter was trained with "
                f"block_size {depth + 1}, set that in its config.json"
            )
    return None


def _rank(name: str) -> int:
    words = ("mask", "pad", "unk")
    return next((i for i, word in enumerate(words) if word in name.lower()), len(words))
