"""Compare a drafter with its published figures, which tells whether it was loaded faithfully.

    python -m benchmarks.published gsm8k.jsonl math500.jsonl --target Qwen/Qwen3-4B \
        --drafter deepseek-ai/dspark_qwen3_4b_block7 --limit 40 --parallel auto [--json FILE]

Published accepted lengths are of another rule than ours. They sample at temperature 1 and accept a
draft x with probability min(1, p(x) / q(x)), p being the target's probability and q the drafter's
(speculative sampling, arXiv 2211.17192); if the draft is rejected, the token comes from what p
exceeds q by. Here drafts share the target's noise instead, so the two cannot be compared directly.

The published number follows from a text that the target sampled, without decoding by that rule. A
round of it emits tokens with the target's probabilities, and given that the next token is x, it was
an accepted draft with probability

    r(x) = p(x) min(1, q(x) / p(x)) / p(x) = min(1, q(x) / p(x)).

So each token of the text says how probably a round goes on through it. From a root at position s of
the text, a round of D drafts accepts n of them with the probability

    P(n) = r(s, 1) ... r(s, n) (1 - r(s, n + 1))   for n < D,    P(D) = r(s, 1) ... r(s, D),

where r(s, j) is of the token at s + j, drafted at depth j after the text's own tokens. It emits
n + 1 tokens, the last of which is the next root. The expected number of rounds is, from the end of
the text backwards,

    N(s) = 1 + sum of P(n) N(s + n + 1).

Example: D is 1, and r is 1/2 everywhere. A round emits 1 or 2 tokens, 1.5 on average, and N(s) is
about 2/3 of the tokens after s. The figure is exact in expectation, uses every position of a text,
and varies less than one run of the rule.

Three traps: the first token of the answer is the target's own and belongs to no round. A text that
ended with a stop token ends a round inside the block, without a bonus token if the stop token was a
draft. A text that was cut at its limit must not end a round there: rounds are counted only from
roots whose whole block and bonus token are in the text.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.common import Parser, command, describe, show, write_json
from treeflash.cli.console import plain_console
from treeflash.cli.options import add_model_options, add_parallel_option, load_model
from treeflash.config import DecodeConfig, Parallel
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError, PromptError
from treeflash.evaluation.records import Record, interval, ratios_of_sums, resamples
from treeflash.evaluation.run import Case, check_max_tokens, decode_prompts, encode_rows
from treeflash.hub.published import drafter_training
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import read_rows

DEPTHS = 7
"""Drafts of a round in the published table: chains of the whole block."""
MAX_TOKENS = 2048
"""New tokens at most, in the published table."""
DTYPE = "bfloat16"


class PublishedRow(NamedTuple):
    """A row of the table: the last part of the target's hub id, and the accepted length by set.

    Accepted lengths count the bonus token, and are tokens over rounds of the whole set.
    """

    target: str
    lengths: tuple[float, ...]


TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
"""Table 1 of DSpark's paper: the sets of its columns, of 30 to 500 prompts each, of which only the
first turn is answered, and accepted lengths by target and by the last part of the drafter's id."""
SETS: tuple[str, ...] = tuple(TABLE["sets"])
ROWS = {
    name: PublishedRow(target, tuple(lengths))
    for target, drafters in TABLE["lengths"].items()
    for name, lengths in drafters.items()
}

CLOSE = 0.03
"""A figure within this share of the published one is as published."""
FAR = 0.10
"""An interval that reaches both the published figure and this share below it decides nothing."""
MIN_PROMPTS = 8
"""Resampling fewer prompts says little about how the figure varies."""


def published_row(drafter: str | None, target: str | None) -> PublishedRow:
    """Return the row of a drafter, by the names of the command line; a ConfigError without one."""
    name = drafter_training(drafter, target).name
    row = ROWS.get(name.rpartition("/")[2].lower())
    if row is None:
        known = ", ".join(f"deepseek-ai/{known}" for known in ROWS)
        what = f"the drafter {name}" if name else "this target"
        raise ConfigError(f"no published figures are known for {what}; --drafter takes {known}")
    return row


def expected_rounds(ratios: NDArray[np.float64], *, complete: bool) -> tuple[float, float]:
    """Return the expected tokens and rounds of speculative sampling along a text.

    Args:
        ratios: (T - 1, D) r of a text of T tokens, 0 to 1: row s is of the block after token s, and
            column j of token s + j + 1. Columns beyond the text are not read.
        complete: whether the text ended with a stop token, and not at its limit.

    Returns:
        Tokens and rounds from the first token of the text on, which is no part of them; (0, 0) if
        the text is too short for a round.
    """
    last, depths = ratios.shape  # the last token of the text is no root
    roots = last if complete else last - depths
    tokens, rounds = np.zeros((2, last + 1))
    for start in reversed(range(roots)):
        reached = np.cumprod(ratios[start, : last - start])
        stays = np.concatenate([[1.0], reached])
        accepted = stays - np.append(reached, 0.0)  # P(n)
        ends = np.minimum(start + 1 + np.arange(len(accepted)), last)
        tokens[start] = accepted @ (ends - start + tokens[ends])
        rounds[start] = 1 + accepted @ rounds[ends]
    return float(tokens[0]), float(rounds[0])


def acceptance_ratios(
    backend: Backend, prompt_ids: Sequence[int], text_ids: Sequence[int]
) -> NDArray[np.float64]:
    """Return r of every token after every root of a text, as `expected_rounds` takes it.

    A conditional head is given the text's own tokens. Both distributions are of temperature 1.
    """
    drafter, head = backend.drafter, backend.head
    assert backend.drafter_config is not None
    assert drafter is not None
    depths = min(DEPTHS, backend.drafter_config.depths)
    length = len(text_ids)
    drafted = np.full((length - 1, depths), -np.inf)
    target = np.zeros(length - 1)  # log probability of the token after each
    with SequenceSession(
        backend, drafts=True, capacity=len(prompt_ids) + length + depths
    ) as session:
        session.extend(prompt_ids)
        for start, root in enumerate(text_ids[:-1]):
            known = np.array(text_ids[start : start + depths + 1], np.int32)
            block = session.draft(root, depths)
            if head is None:
                log_probs = drafter.log_probs(block)
            else:
                previous = np.pad(known, (0, depths + 1 - len(known)), mode="edge")[:depths]
                log_probs = head.log_probs(block, previous)
            following = known[1:]
            drafted[start, : len(following)] = log_probs[np.arange(len(following)), following]
            logits = session.logits(DraftTree.root_only(root))[0].astype(np.float64)
            highest = logits.max()
            target[start] = logits[following[0]] - highest - np.log(np.exp(logits - highest).sum())
            session.commit(np.zeros(1, np.int32))
    # Column j of row s is of the token after s + j.
    after = np.minimum(np.arange(length - 1)[:, None] + np.arange(depths), length - 2)
    ratios: NDArray[np.float64] = np.exp(np.minimum(drafted - target[after], 0.0))
    return ratios


@dataclass
class Lengths:
    """Expected tokens and rounds of the finished prompts, by set and place in the file."""

    by_set: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)

    def measure(
        self,
        backend: Backend,
        sets: Mapping[str, Sequence[Sequence[int]]],
        config: DecodeConfig,
        console: Console,
        parallel: Parallel,
    ) -> None:
        """Sample a text for each prompt and follow the drafter along it, with a progress bar.

        A prompt whose text is too short for a round counts nothing.
        """
        configs = {Case(config.method, 1): config}
        self.by_set = {name: {} for name in sets}
        for prompt in decode_prompts(backend, sets, configs, console, parallel):
            text = prompt.text_ids
            ratios = acceptance_ratios(backend, prompt.ids, text)
            found = expected_rounds(ratios, complete=text[-1] in config.stop_token_ids)
            if found[1]:
                self.by_set[prompt.set_name][prompt.number] = found

    def records(self, row: PublishedRow, differences: Sequence[str], seed: int) -> list[Record]:
        """Compare each set that has prompts with the table; intervals are over prompts."""
        rng = np.random.default_rng(seed)
        columns = {_plain(name): length for name, length in zip(SETS, row.lengths, strict=True)}
        records: list[Record] = []
        for name, found in self.by_set.items():
            if not found:
                continue
            # The prompts have the order of the file, on which the intervals depend.
            pairs = [found[number] for number in sorted(found)]
            values = ratios_of_sums(pairs, resamples(len(found), rng))
            low, high = interval(values)
            record: Record = {"set": name, "published": columns.get(_plain(name))}
            record |= {"measured": float(values[0]), "low": low, "high": high}
            record |= {"prompts": len(found)}
            records.append(record | {"verdict": verdict(record, differences)})
        return records


def verdict(record: Record, differences: Sequence[str]) -> str:
    """Say what an interval means beside the published figure.

    - `not comparable`: something differs from the protocol, the table lacks the set, or the figure
      is clearly above the published one, as with other prompts;
    - `too low`: the interval ends more than `CLOSE` below the published figure;
    - `undecided`: the interval is so wide that a drafter `FAR` below would fit too;
    - `faithful`: otherwise.
    """
    published, low, high = record["published"], record["low"], record["high"]
    if differences or published is None:
        return "not comparable"
    if record["prompts"] < MIN_PROMPTS:
        return "undecided"
    if high < (1 - CLOSE) * published:
        return "too low"
    if low > (1 + CLOSE) * published:
        return "not comparable"
    return "undecided" if low <= (1 - FAR) * published else "faithful"


def list_differences(
    model: LanguageModel, row: PublishedRow, config: DecodeConfig
) -> Iterator[str]:
    """Yield what differs from the protocol of the table, in words."""
    names, backend = model.names, model.backend
    target = (names["target"] or "").rpartition("/")[2]
    if target.lower() != row.target.lower():
        yield f"the target is {target or backend.name}, not {row.target}"
    if backend.dtype != DTYPE:
        yield f"the dtype is {backend.dtype}, not {DTYPE}"
    for setting in ("adapter", "kv_bits"):
        if getattr(model.loaded, setting) is not None:
            yield f"{setting.replace('_', ' ')} is set"
    if not model.tokenizer.has_chat_template or model.tokenizer.thinking:
        yield "the prompts are without the chat template, or thinking is on"
    depths = 0 if backend.drafter_config is None else backend.drafter_config.depths
    if depths < DEPTHS:
        yield f"the drafter has {depths} depths, not {DEPTHS}"
    if config.max_tokens < MAX_TOKENS:
        yield f"texts have {config.max_tokens} new tokens at most, not {MAX_TOKENS}"


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=40, max_tokens=MAX_TOKENS)
    add_parallel_option(options, 1, "texts that are sampled at once, or auto (default: 1)")
    options.add_decode_options("seed")
    add_model_options(options)
    return options


def report(records: Sequence[Record], differences: Sequence[str]) -> None:
    """Print the comparison, and what makes it impossible."""
    show("tokens per round of speculative sampling at temperature 1", records)
    for reason in differences:
        print(f"not comparable, because {reason}")
    if any(record["verdict"] == "too low" for record in records):
        print("too low: `treeflash doctor` finds the settings that are likely wrong")


@command(parser)
def main(args: Namespace) -> int:
    """Measure, print, write; what was measured is printed and written however the run ends."""
    check_max_tokens(args.max_tokens)
    rows = {path.stem: read_rows(path)[: args.limit] for path in args.prompts}
    published = published_row(args.drafter, args.target)
    model = load_model(args)
    if model.backend.drafter is None:
        raise ConfigError("no drafter was loaded, so there is nothing to compare; pass --drafter")
    config = model.decode_config(
        {"method": "ar", "temperature": 1.0, "max_tokens": args.max_tokens, "seed": args.seed}
    )
    differences = list(list_differences(model, published, config))
    sets = {
        name: encode_rows(model, prompts, {Case("ar", 1): config}) for name, prompts in rows.items()
    }
    lengths = Lengths()
    console = plain_console()
    try:
        lengths.measure(model.backend, sets, config, console, args.parallel)
    finally:
        records = lengths.records(published, differences, config.sampling.seed)
        if records:
            report(records, differences)
            settings = {"max_tokens": args.max_tokens, "seed": args.seed, **model.names}
            found = {"differences": differences, "published": records}
            write_json(args.json, args.benchmark, describe(model.backend) | settings | found)
    if not records:
        raise PromptError("every text was too short for a round of drafts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
