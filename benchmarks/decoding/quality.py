"""Logits of a target with few bits, compared with the logits of its dequantised weights.

    python -m benchmarks.decoding.quality gsm8k.jsonl humaneval.jsonl --target FILE.gguf

The texts are the prompts with answers of plain decoding, with the weights dequantised to float32.
`divergence` is the mean KL divergence in nats from this target at the tokens of the answers,
`same top` the share of tokens with the same most likely token; `perplexity` measures the answers.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Parser, Row, command, publish, read_prompts
from treeflash.decoding.tree import DraftTree
from treeflash.language_model import LanguageModel, load

REFERENCE: Mapping[str, Any] = {"bits": 16, "dtype": "float32"}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "dequantised, bfloat16": {"bits": 16, "dtype": "bfloat16"},
    "its own bits, bfloat16": {"dtype": "bfloat16", "exact": True},
    "its own bits, float32": {"dtype": "float32", "exact": True},
}
"""Settings of `load` by what they do with weights, and the dtype of activations."""


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_prompts(limit=2, max_tokens=96)
    options.add_argument("--target", metavar="FILE_OR_ID", help="(default: SmolLM2-135M-Instruct)")
    return options


def log_probabilities(
    model: LanguageModel, token_ids: Sequence[int], answer: int
) -> NDArray[np.float64]:
    """Return (answer, vocab_size) log probabilities of the last tokens, each after the others."""
    count = len(token_ids)
    chain = DraftTree.chain(np.array(token_ids, np.int32))
    with closing(model.backend.open(count, drafts=False)) as state:
        (logits,) = model.backend.verifier.logits([(state, chain)]).logits
    values = np.asarray(logits, np.float64)[count - answer - 1 : count - 1]
    values -= values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def measure(args: Namespace) -> Iterator[Row]:
    """Yield a row for the reference and for each variant."""
    fixed: Mapping[str, Any] = {"drafter": False, "backend": "cuda", "device": "cpu"}
    reference = load(args.target, **fixed, **REFERENCE)
    prompts = [
        prompt
        for path in args.prompts
        for prompt in read_prompts(reference.tokenizer, path, args.limit)
    ]
    options = {"method": "ar", "max_tokens": args.max_tokens}
    answers = [reference.generate(prompt, **options).token_ids for prompt in prompts]
    expected = [
        log_probabilities(reference, [*prompt, *answer], len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    yield row("dequantised, float32", answers, expected, expected)
    del reference
    for name, settings in VARIANTS.items():
        model = load(args.target, **fixed, **settings)
        actual = [
            log_probabilities(model, [*prompt, *answer], len(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        yield row(name, answers, expected, actual)


def row(
    name: str,
    answers: Sequence[Sequence[int]],
    expected: Sequence[NDArray[np.float64]],
    actual: Sequence[NDArray[np.float64]],
) -> Row:
    """Return the means over all tokens of answers."""
    p, q = np.concatenate(expected), np.concatenate(actual)
    tokens = np.concatenate([np.array(answer) for answer in answers])
    return {
        "weights and activations": name,
        "tokens": len(tokens),
        "divergence": f"{float((np.exp(p) * (p - q)).sum(-1).mean()):.5f}",
        "same top": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "perplexity": f"{float(np.exp(-q[np.arange(len(tokens)), tokens].mean())):.4f}",
    }


@command(parser)
def main(args: Namespace) -> int:
    """Measure, print, write."""
    return publish(args, {"max_tokens": args.max_tokens}, rows=list(measure(args)))


if __name__ == "__main__":
    sys.exit(main())
