"""What may be wrong with a pair: each check changes one thing and looks whether drafts improve."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from treeflash.config import DrafterConfig
from treeflash.decoding.interfaces import Backend
from treeflash.diagnosis.finding import Finding, Trial, judge
from treeflash.diagnosis.scores import Agreement, Gain, Scores, Text, answer, by_depth, measure
from treeflash.drafters.folder import read_config, weight_files
from treeflash.errors import CheckpointError, NumericalError, PromptError
from treeflash.text.chat import Prompting
from treeflash.text.prompt import Message
from treeflash.text.tokenizer import Tokenizer

# Gains in nats that matter: the true tokens are then 1.1 times as probable. Another prompting
# brings other texts, and those differ by more all by themselves.
SAME_TEXTS, OTHER_TEXTS = 0.1, 0.5
# Nats that one depth falls behind the one before: a factor of 7. Sound drafters lose 1 at most.
COLLAPSE = 2.0
CHANCE = 0.1  # agreement that frequent tokens alone come near to
MASK_CANDIDATES = 8


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that was found.

    Attributes:
        marginal: share of roots for which the drafter's best token at each depth is the target's.
        corrected: the same of the AR head, after the true previous token; None without a head.
        findings: one a check.
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
) -> Diagnosis:
    """Examine a pair. It is loaded some ten times, one after the other.

    Args:
        load: loads the target with the drafter of a folder.
        folder: the drafter's.
        tokenizer: the target's.
        prompts: conversations; the target's greedy answers are what is to be drafted.
        prompting: how they are put.
        max_tokens: of an answer.

    Raises:
        PromptError: a prompt cannot be decoded, or the answers are too short.
        NumericalError: a model produced values that are not finite.
    """
    pair = _see(load(folder), tokenizer, prompts, prompting, max_tokens)
    agreement, config = pair.agreement, pair.config

    def change(**settings: object) -> Gain | None:
        """What other settings of the drafter gain; None where it cannot run with them."""
        gc.collect()  # the pair before may be tied into cycles, and there is room for one
        with TemporaryDirectory() as scratch:
            write_changed(folder, Path(scratch), settings)
            try:
                changed = measure(load(Path(scratch)), pair.texts)
            except (CheckpointError, NumericalError):
                return None
        return agreement.gain_of(changed.marginal)

    layers = [[i + step for i in config.target_layer_ids] for step in (-1, 1)]
    masks = mask_candidates(tokenizer, config.mask_token_id, pair.vocab_size)
    rows = {"i - 1": agreement.earlier, "i + 1": agreement.later}
    trials = [
        Trial(
            check="block offset",
            gains={
                f"with row i of the block taken for depth {depth}": agreement.gain_of(scores)
                for depth, scores in rows.items()
            },
            least=SAME_TEXTS,
            advice="row i must predict depth i, the root being row 0: train or export it so",
        ),
        Trial(
            check="prompting",
            gains=pair.prompted,
            least=OTHER_TEXTS,
            advice="prompt it so, or use a drafter that was trained with your way of prompting",
        ),
        Trial(
            check="target layers",
            gains={f"with target_layer_ids {ids}": change(target_layer_ids=ids) for ids in layers},
            least=SAME_TEXTS,
            advice="set them in the drafter's config.json",
        ),
        Trial(
            check="mask token",
            gains={
                f"with mask_token_id {token_id} ({name})": change(mask_token_id=token_id)
                for token_id, name in masks.items()
            },
            least=SAME_TEXTS,
            advice="set it in the drafter's config.json",
        ),
    ]
    return Diagnosis(
        marginal=by_depth(agreement.marginal.hits),
        corrected=by_depth(agreement.corrected.hits) if agreement.corrected else None,
        findings=[check_depths(agreement), *judge(trials)],
    )


def check_depths(agreement: Agreement) -> Finding:
    """Whether drafts agree at depth 1 at all, and how they go on from each depth to the next."""
    for name, scores in (("", agreement.marginal), (" of the AR head", agreement.corrected)):
        problem = _collapse(scores, name) if scores else None
        if problem:
            return Finding(check="depths", ok=False, message=problem)
    return Finding(check="depths", ok=True, message="no depth falls far behind the one before")


def mask_candidates(tokenizer: Tokenizer, current: int, vocab_size: int) -> dict[int, str]:
    """Tokens that may serve as the mask, the likeliest by name first, without the current one."""
    names = {token_id: tokenizer.token_text(token_id) for token_id in tokenizer.special_token_ids}
    names[tokenizer.size] = "mask: the first that the tokenizer does not know"
    likely = sorted(names, key=lambda token_id: (_rank(names[token_id]), token_id))
    usable = [i for i in likely if i != current and i < vocab_size]
    return {token_id: names[token_id] for token_id in usable[:MASK_CANDIDATES]}


def write_changed(folder: Path, copy: Path, settings: Mapping[str, object]) -> None:
    """Write a drafter's folder with other settings, and links to its weights."""
    config = read_config(folder)
    config["dflash_config"] = {**(config.get("dflash_config") or {}), **settings}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in weight_files(folder):
        (copy / file.name).symlink_to(file.resolve())


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """What was seen of the pair as it is; it holds no model, so that the next one has room."""

    config: DrafterConfig
    vocab_size: int
    texts: list[Text]
    agreement: Agreement
    prompted: dict[str, Gain | None]


def _see(
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
    agreement = measure(backend, texts, backend.head)
    prompted: dict[str, Gain | None] = {}
    for way in prompting.others(tokenizer):
        try:
            other = measure(backend, answers(way))
        except PromptError:  # a template may refuse what another way takes
            continue
        prompted[str(way)] = Gain.between(
            agreement.by_text(len(prompts)), other.by_text(len(prompts))
        )
    return _Pair(
        config=backend.drafter_config,
        vocab_size=backend.vocab_size,
        texts=texts,
        agreement=agreement,
        prompted=prompted,
    )


def _collapse(scores: Scores, name: str) -> str | None:
    hits = by_depth(scores.hits)
    if hits[0] < CHANCE:
        return (
            f"the best token{name} at depth 1 is the target's in {hits[0]:.0%} of cases, no better "
            "than chance; where no other check says why, it is a drafter for another target"
        )
    for depth in range(1, len(hits)):
        here, next_ = (scores.log_probs[:, d : d + 1] for d in (depth - 1, depth))
        if Gain.between(next_, here).is_clear(COLLAPSE):
            return (
                f"agreement{name} falls from {hits[depth - 1]:.0%} at depth {depth} to "
                f"{hits[depth]:.0%} at depth {depth + 1}; if it was trained with block_size "
                f"{depth + 1}, set that in the drafter's config.json"
            )
    return None


def _rank(name: str) -> int:
    words = ("mask", "pad", "unk")
    return next((i for i, word in enumerate(words) if word in name.lower()), len(words))
