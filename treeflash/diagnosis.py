"""What may be wrong with a pair: each check changes one thing and looks whether drafts improve."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from treeflash.agreement import Agreement, Gain, Scores, Text, answer, by_depth, measure
from treeflash.checkpoints import read_config, weight_files
from treeflash.config import DrafterConfig
from treeflash.errors import CheckpointError, NumericalError
from treeflash.interfaces import Backend
from treeflash.prompt import Message
from treeflash.prompting import Prompting
from treeflash.text import Tokenizer

# A gain in nats is clear from 0.1 on where the texts are the same: the true tokens are then 1.1
# times as probable. Another prompting brings other texts, which differ by as much by themselves.
SAME_TEXTS, OTHER_TEXTS = 0.1, 0.5
# Nats that one depth falls behind the one before: a factor of 7. Sound drafters lose 1 at most.
COLLAPSE = 2.0
CHANCE = 0.1  # agreement that frequent tokens alone come near to
MASK_CANDIDATES = 8


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: its name.
        ok: whether nothing was found.
        message: what was seen; where it is a problem, what to change.
    """

    check: str
    ok: bool
    message: str


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


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """What was seen of the pair as it is; it holds no model, so that the next one has room."""

    config: DrafterConfig
    vocab_size: int
    texts: list[Text]
    agreement: Agreement
    prompted: dict[Prompting, Gain]


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
    agreement = pair.agreement
    corrected = agreement.corrected

    def change(**settings: object) -> Gain | None:
        return _gain_of_change(load, folder, pair, settings)

    return Diagnosis(
        marginal=by_depth(agreement.marginal.hits),
        corrected=None if corrected is None else by_depth(corrected.hits),
        findings=[
            check_depths(agreement),
            check_offset(agreement),
            check_prompting(prompting, pair.prompted),
            check_layers(pair.config, change),
            check_mask(pair.config, mask_candidates(tokenizer, pair), tokenizer, change),
        ],
    )
