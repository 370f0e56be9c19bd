"""Tokens per pass of a drafted chain under three rules of acceptance, when sampling.

    python -m benchmarks.decoding.acceptance_rules gsm8k.jsonl --temperatures 0.6,1 [--json FILE]

All rules have the same drafter, AR head, chain length and prompts:

- `shared`: draft and target add the same noise to their logits; a draft is accepted if it is the
  target's token (Daliri et al. 2024, arXiv 2408.07978). It is the rule of this package.
- `match`: as before, but the draft has its own noise.
- `rejection`: a draft x is accepted with probability min(1, p(x) / q(x)), and otherwise replaced by
  a token of the normalised max(p - q, 0) (Leviathan et al. 2023, arXiv 2211.17192).

Intervals are 95 % bootstrap intervals over prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.common import (
    Parser,
    Row,
    describe,
    parse_option,
    read_prompts,
    show,
    write_json,
)
from treeflash.cli.console import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.decoding.interfaces import Backend, Block
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError
from treeflash.evaluation.records import MEAN, block_efficiencies, interval, resamples
from treeflash.evaluation.run import softmax

Rule: TypeAlias = Literal["shared", "match", "rejection"]
RULES: tuple[Rule, ...] = get_args(Rule)
Floats: TypeAlias = NDArray[np.float64]


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=4, max_tokens=48)
    temperature = partial(parse_option, "temperature")
    options.add_list("--temperatures", temperature, [0.6, 1.0], "temperatures", "T,...")
    add_model_options(options)
    return options


def draft(
    backend: Backend, block: Block, root: int, temperature: float, noise: Floats
) -> tuple[NDArray[np.int32], Floats]:
    """Return (D,) tokens of a chain and (D, vocab) the distributions that they were drawn from."""
    depths = len(noise)
    tokens, q = np.zeros(depths, np.int32), np.zeros(noise.shape)
    previous = np.full(depths, root, np.int32)
    for depth in range(depths):
        if depth == 0 or backend.head is not None:
            assert backend.drafter is not None
            log_probs = (
                backend.drafter.log_probs(block)
                if backend.head is None
                else backend.head.log_probs(block, previous)
            )
            q[depth:] = softmax(log_probs[depth:depths], temperature)
        with np.errstate(divide="ignore"):
            tokens[depth] = (np.log(q[depth]) + noise[depth]).argmax()
        previous[depth + 1 :] = tokens[depth]
    return tokens, q


def accept(
    rule: Rule,
    tokens: NDArray[np.int32],
    p: Floats,
    q: Floats,
    noise: Floats,
    rng: np.random.Generator,
) -> list[int]:
    """Return the accepted drafts and the token after them."""
    emitted = []
    for depth, own in enumerate(p):
        drafted = int(tokens[depth]) if depth < len(tokens) else -1
        if rule != "rejection":
            with np.errstate(divide="ignore"):
                emitted.append(int((np.log(own) + noise[depth]).argmax()))
        elif drafted < 0:
            emitted.append(int(rng.choice(len(own), p=own)))
        elif rng.random() * q[depth, drafted] < own[drafted]:
            emitted.append(drafted)
        else:
            rest = np.maximum(own - q[depth], 0)
            emitted.append(int(rng.choice(len(own), p=rest / rest.sum())))
        if emitted[-1] != drafted:
            break
    return emitted


def accepted_lengths(
    backend: Backend, prompt_ids: Sequence[int], rule: Rule, temperature: float, max_tokens: int
) -> list[int]:
    """Decode one text; returns the tokens of each pass after the prefill."""
    assert backend.drafter_config is not None
    depths = backend.drafter_config.depths
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    with SequenceSession(
        backend, drafts=True, capacity=len(prompt_ids) + max_tokens + 2 * depths + 2
    ) as session:
        root = session.extend(prompt_ids)
        while sum(lengths) < max_tokens:
            noise = rng.gumbel(size=(depths + 1, backend.vocab_size))
            drafter_noise = rng.gumbel(size=(depths, backend.vocab_size))
            if rule == "shared":
                drafter_noise = noise[:depths]
            tokens, q = draft(backend, session.draft(root), root, temperature, drafter_noise)
            tree = DraftTree.chain(np.array([root, *tokens], np.int32))
            p = softmax(session.logits(tree), temperature)
            emitted = accept(rule, tokens, p, q, noise, rng)
            session.commit(np.arange(len(emitted), dtype=np.int32))
            lengths.append(len(emitted))
            root = emitted[-1]
    return lengths


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    model = load_model(args)
    if model.backend.drafter is None:
        raise ConfigError("the benchmark compares drafts; pass --drafter")
    sets = {path.stem: read_prompts(model.tokenizer, path, args.limit) for path in args.prompts}
    prompts = [(name, ids) for name, own in sets.items() for ids in own]
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for temperature, rule in product(args.temperatures, RULES):
        lengths: dict[str, list[list[int]]] = {name: [] for name in sets}
        for name, ids in track(prompts, f"{rule}, {temperature}"):
            lengths[name].append(
                accepted_lengths(model.backend, ids, rule, temperature, args.max_tokens)
            )
        values = {}
        for name, own in lengths.items():
            values[name] = block_efficiencies(own, resamples(len(own), rng))
        values[MEAN] = np.mean(list(values.values()), 0)
        low, high = interval(values[MEAN])
        columns = {name: float(own[0]) for name, own in values.items()}
        rows.append({"temperature": temperature, "rule": rule, **columns, "low": low, "high": high})
    pair = describe(model.backend)
    show(f"acceptance rules, {', '.join(pair.values())}", rows)
    write_json(args.json, "acceptance_rules", pair | {"acceptance_rules": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
