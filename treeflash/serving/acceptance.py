"""Whether drafts are right about as often as in the drafter's own evaluation.

A drafter that does not fit what a server runs changes no answer: it only makes all of them slow, so
that nobody notices. What is compared is how often the drafter's first choice for the next token is
the target's. Accepted lengths depend on budgets and methods as well, and this does not:

    128 drafts in answers of the server, and 28 have the right first token: 22 %
    evaluation.json in the drafter's folder, depth 1: 73 %
    22 % is less than half of 73 %: one line in the log, with what may be the reason
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from treeflash.config import SamplingConfig
from treeflash.decoding.loop import Step
from treeflash.drafters.evaluation import read_evaluation
from treeflash.drafters.folder import is_quantised, read_config
from treeflash.hub.published import model_name
from treeflash.language_model import LanguageModel

DRAFTS = 128
"""Drafts that a share is taken over; its standard error is 0.05 at most."""
EVERY = 8
"""One of this many drafts is counted, because its table may have to be made for it."""
LOW = 0.5
"""A share below this part of the evaluation's is low."""
FLOOR = 0.25
"""A share below this one is low if the drafter's folder has no evaluation."""
LONG = 4096
"""Tokens of the longest texts that a drafter without an evaluation is taken to be trained on: those
of DeepSpec were."""

logger = logging.getLogger("treeflash.serving")


@dataclass(eq=False)
class AcceptanceMonitor:
    """How often the first drafted token is right; the log says once that it is too rarely.

    Attributes:
        share: the part of the latest `DRAFTS` counted drafts whose first token was right; None
            before there are as many.
    """

    model: LanguageModel
    share: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        folder = self.model.drafter_folder
        self._evaluation = None if folder is None else read_evaluation(folder)
        self._seen = self._drafts = self._right = self._positions = 0
        self._warned = False

    @property
    def expected(self) -> float | None:
        """The share in the drafter's evaluation; None without one."""
        return None if self._evaluation is None else self._evaluation.by_depth[0]

    @property
    def is_low(self) -> bool:
        """Whether the share is far below the share in the evaluation."""
        least = FLOOR if self.expected is None else LOW * self.expected
        return self.share is not None and self.share < least

    def add(self, step: Step, sampling: SamplingConfig, length: int) -> None:
        """Count a step of a sequence with `length` tokens.

        Above the temperature 1, tokens are too random for any drafter, and are left out.
        """
        if step.table is None or sampling.temperature > 1:
            return
        self._seen += 1
        if self._seen % EVERY:
            return
        self._drafts += 1
        # The tree may begin with a copy of the text instead.
        self._right += int(step.table.tokens[0, 0, 0]) == step.tokens[0]
        self._positions += length
        if self._drafts < DRAFTS:
            return
        self.share, context = self._right / DRAFTS, self._positions // DRAFTS
        self._drafts = self._right = self._positions = 0
        if self.is_low and not self._warned:
            self._warned = True
            logger.warning(self._warning(self.share, context))

    def _warning(self, share: float, context: int) -> str:
        known = (
            f"a drafter that fits has more than {FLOOR:.0%}"
            if self.expected is None
            else f"in the drafter's own evaluation it was in {self.expected:.0%}"
        )
        reasons = "; ".join(f"{why} ({shlex.join(how)})" for why, how in self._reasons(context))
        return (
            f"the first drafted token is right in {share:.0%} of {DRAFTS} drafts, and {known}. "
            f"Possible reasons, with a command that checks each: {reasons}"
        )

    def _reasons(self, context: int) -> Iterator[tuple[str, list[str]]]:
        """Yield what may be the reason at a mean context, and the command that checks it."""
        model, loaded = self.model, self.model.loaded
        folders = {"--target": model.folder, "--drafter": model.drafter_folder}
        pair = [x for flag, folder in folders.items() if folder for x in (flag, _name(folder))]
        shape = model.backend.drafter_config
        is_block = shape is not None and shape.has_marginals
        # Only the settings of block drafters can be checked by `doctor`.
        check = ["doctor"] if is_block else ["evaluate", "--prompts", "FILE.jsonl"]
        check = ["treeflash", *check, *pair]
        yield "a target that is a fine-tune, or not the drafter's", check
        if model.tokenizer.knows_thinking and not model.tokenizer.thinking:
            thinking = ["--chat-template-args", '{"enable_thinking": true}', "PROMPT"]
            yield (
                "thinking, which was off in its training",
                [*check, "--thinking"] if is_block else ["treeflash", "generate", *pair, *thinking],
            )
        longest = LONG if self._evaluation is None else self._evaluation.max_length
        if is_block and context > longest:
            window = ["treeflash", "serve", *pair, "--draft-window", str(longest)]
            yield f"contexts of {context} tokens, after a training with {longest}", window
        if loaded.adapter is not None:
            yield "the adapter", [*check, "--adapter", loaded.adapter]
        if loaded.kv_bits is not None:
            yield "the quantised KV cache", [*check, "--kv-bits", str(loaded.kv_bits)]
        if loaded.draft_bits is not None:
            yield "the quantised drafter", [*check, "--draft-bits", "16"]
        if model.folder is not None and is_quantised(read_config(model.folder)):
            original = [x if x != _name(model.folder) else "ORIGINAL" for x in check]
            yield "the quantised target, unlike the original", original


def _name(folder: Path) -> str:
    """Return the hub id of a folder of the hub's cache, else its path."""
    name = model_name(folder)
    return name if "/" in name else str(folder)
