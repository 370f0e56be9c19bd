"""Diagnose a pair: each check changes one setting and tests whether drafts improve."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from treeflash.decoding.interfaces import Backend
from treeflash.diagnosis.doubtful_settings import doubtful_settings
from treeflash.diagnosis.finding import Finding, Trial, judge
from treeflash.diagnosis.scores import (
    DrafterScores,
    Gain,
    Text,
    TokenScores,
    answer,
    by_depth,
    measure,
)
from treeflash.drafter_config import DrafterConfig
from treeflash.drafters.folder import read_config, weight_files
from treeflash.drafters.formats import unknown_keys, with_settings
from treeflash.errors import CheckpointError, NumericalError, PromptError
from treeflash.text.chat import Prompting
from treeflash.text.prompt import Message
from treeflash.text.tokenizer import Tokenizer

# Smallest gains that matter, nats: 0.1 makes tokens 1.1 times as probable. Prompting differently
# changes the texts, which alone makes a larger difference.
SAME_TEXTS, OTHER_TEXTS = 0.1, 0.5
# Nats lost from one depth to the next: a factor of 7. Sound drafters lose at most 1.
COLLAPSE = 2.0
CHANCE = 0.1  # agreement that guessing frequent tokens nearly reaches
MASK_CANDIDATES = 8


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The outcome of all checks.

    Attributes:
        marginal: by depth, the fraction of blocks whose top token is the target's.
        corrected: the same for the AR head, given the previous token; None without a head.
        findings: one per check.
    """

    marginal: list[float]
    corrected: list[float] | None
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether no check found a problem."""
        return all(finding.ok for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
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
) -> Diagnosis:
    """Run all checks on a pair. This loads the pair about ten times, one after the other.

    Args:
        load: loads the target with the drafter of a folder.
        folder: the drafter's.
        tokenizer: the target's.
        prompts: conversations; the drafter is scored on the target's greedy answers to them.
        prompting: how they are given to the target.
        max_tokens: maximum length of an answer.
        target_config: of the target; None if it is not known.

    Raises:
        PromptError: a prompt cannot be decoded, or the answers are too short.
        NumericalError: a model produced values that are not finite.
    """
    pair = _measure_pair(load(folder), tokenizer, prompts, prompting, max_tokens)
    scores, config = pair.scores, pair.config

    def change(**settings: object) -> Gain | None:
        """The gain of other drafter settings; None if the pair cannot run with them."""
        gc.collect()  # the previous pair may be in a reference cycle, and memory may fit only one
        with TemporaryDirectory() as scratch:
            write_changed(folder, Path(scratch), settings)
            try:
                changed = measure(load(Path(scratch)), pair.texts)
            except (CheckpointError, NumericalError):
                return None
        return scores.gain_of(changed.marginal)

    own, target = read_config(folder), target_config or {}
    masks = mask_candidates(tokenizer, config.mask_token_id, pair.vocab_size)
    rows = {"i - 1": scores.earlier, "i + 1": scores.later}
    trials = [
        Trial(
            check="block offset",
            gains={
                f"row i of the block taken for depth {depth}": scores.gain_of(shifted)
                for depth, shifted in rows.items()
            },
            least=SAME_TEXTS,
            advice="row i must predict depth i, with the root in row 0 (speculators: "
            "sample_from_anchor says whether the root's row predicts): fix training or export",
        ),
        Trial(
            check="prompting",
            gains=pair.prompted,
            least=OTHER_TEXTS,
            advice="prompt this way, or use a drafter trained for your way of prompting",
        ),
        *(
            Trial(
                check=setting.check,
                gains={name: change(**changed) for name, changed in setting.others.items()},
                least=SAME_TEXTS,
                advice=setting.advice,
            )
            for setting in doubtful_settings(config, own, target, masks)
        ),
    ]
    return Diagnosis(
        marginal=by_depth(scores.marginal.hits),
        corrected=by_depth(scores.corrected.hits) if scores.corrected else None,
        findings=[
            check_depths(scores),
            *judge(trials),
            *check_keys(own),
            *check_precision(target),
        ],
    )


def check_keys(config: Mapping[str, Any]) -> list[Finding]:
    """Lists the keys of a drafter's configuration that were ignored; nothing if there are none."""
    ignored = unknown_keys(config)
    if not ignored:
        return []
    message = f"config.json has keys that are not known and were ignored: {', '.join(ignored)}"
    return [Finding(check="config keys", ok=True, message=message)]


def check_precision(target_config: Mapping[str, Any]) -> list[Finding]:
    """Says that a target is quantised, as published drafters read features of one that is not."""
    if not any(target_config.get(key) for key in ("quantization", "quantization_config")):
        return []
    message = (
        "the target is quantised; a drafter that was trained on its source precision may be "
        "accepted less often, which only a run with that target shows"
    )
    return [Finding(check="precision", ok=True, message=message)]


def check_depths(scores: DrafterScores) -> Finding:
    """Whether drafts agree at depth 1 at all, and do not collapse from one depth to the next."""
    for name, of in (("drafter", scores.marginal), ("AR head", scores.corrected)):
        problem = _collapse(of, name) if of else None
        if problem:
            return Finding(check="depths", ok=False, message=problem)
    return Finding(check="depths", ok=True, message="agreement does not collapse at any depth")


def mask_candidates(tokenizer: Tokenizer, current: int, vocab_size: int) -> dict[int, str]:
    """Tokens that may be the mask, the most plausible names first, without the current one."""
    names = {token_id: tokenizer.token_text(token_id) for token_id in tokenizer.special_token_ids}
    names[tokenizer.size] = "mask: the first id after the tokenizer's"
    likely = sorted(names, key=lambda token_id: (_rank(names[token_id]), token_id))
    usable = [i for i in likely if i != current and i < vocab_size]
    return {token_id: names[token_id] for token_id in usable[:MASK_CANDIDATES]}


def write_changed(folder: Path, copy: Path, settings: Mapping[str, object]) -> None:
    """Write a copy of a drafter's folder with other settings and links to its weights."""
    config = with_settings(read_config(folder), settings)
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in weight_files(folder):
        (copy / file.name).symlink_to(file.resolve())


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Measurements of the pair as it is. Holds no model, to leave memory for the next one."""

    config: DrafterConfig
    vocab_size: int
    texts: list[Text]
    scores: DrafterScores
    prompted: dict[str, Gain | None]


def _measure_pair(
    backend: Backend,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    prompting: Prompting,
    max_tokens: int,
) -> _Pair:
    assert backend.drafter_config is not None

    def answers(way: Prompting) -> list[Text]:
        ids = [way.encode(tokenizer, prompt) for prompt in prompts]
        return [answer(backend, each, max_tokens, tokenizer.stop_token_ids) for each in ids]

    texts = answers(prompting)
    scores = measure(backend, texts, backend.head)
    prompted: dict[str, Gain | None] = {}
    for way in prompting.others(tokenizer):
        try:
            other = measure(backend, answers(way))
        except PromptError:  # a template may reject what another one accepts
            continue
        prompted[str(way)] = Gain.between(scores.by_text(len(prompts)), other.by_text(len(prompts)))
    return _Pair(
        config=backend.drafter_config,
        vocab_size=backend.vocab_size,
        texts=texts,
        scores=scores,
        prompted=prompted,
    )


def _collapse(scores: TokenScores, name: str) -> str | None:
    hits = by_depth(scores.hits)
    if hits[0] < CHANCE:
        return (
            f"the {name}'s top token at depth 1 matches the target in {hits[0]:.0%} of cases, no "
            "better than chance; if no other check explains it, the drafter is for another target"
        )
    for depth in range(1, len(hits)):
        here, next_ = (scores.log_probs[:, d : d + 1] for d in (depth - 1, depth))
        if Gain.between(next_, here).is_clear(COLLAPSE):
            return (
                f"the {name}'s agreement falls from {hits[depth - 1]:.0%} at depth {depth} to "
                f"{hits[depth]:.0%} at depth {depth + 1}; if the drafter was trained with "
                f"block_size {depth + 1}, set that in its config.json"
            )
    return None


def _rank(name: str) -> int:
    words = ("mask", "pad", "unk")
    return next((i for i, word in enumerate(words) if word in name.lower()), len(words))
