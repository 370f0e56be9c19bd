"""Comparisons on a forced text: the target writes it, and a replay accepts what decoding does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from treeflash.config import METHODS, DecodeConfig
from treeflash.decoding import decode
from treeflash.language_model import load

PROMPT = "The sea is"
TOKENS = 24


@pytest.fixture(scope="module")
def model(tiny_pair):
    target, drafter = tiny_pair
    return load(target, drafter, backend="reference")


def texts(model, **options) -> tuple[list[int], list[int]]:
    """The new tokens, and the accepted length of each iteration."""
    config = DecodeConfig(max_tokens=TOKENS, **options)
    first, *steps = decode(model.backend, model.tokenizer.chat(chat(PROMPT)), config)
    tokens = [*first.tokens, *(token for step in steps for token in step.tokens)]
    return tokens, [len(step.tokens) for step in steps]


def chat(prompt):
    return [{"role": "user", "content": prompt}]


@pytest.mark.parametrize("method", METHODS)
def test_the_target_writes_the_forced_text(method, module, model):
    root, *own = texts(model, method="ar")[0]
    forced = module("decoding.forced_text").ForcedText(model.backend)
    forced.text = [root, *((token + 1) % model.backend.vocab_size for token in own)]
    assert texts(replace(model, backend=forced), method=method, budget=8)[0] == forced.text


@pytest.mark.parametrize("method", ["treeflash", "ddtree"])
@pytest.mark.parametrize("rows", ["auto", None, 4])
def test_a_replay_accepts_what_decoding_does(rows, method, module, model):
    replay = module("decoding.replay")
    head = replay.Head(None, rows)
    args = replay.parser().parse_args(["x", "--budgets", "2,8,32", "--method", method])
    args.max_tokens, args.heads = TOKENS, [head]
    found = replay.replay(model, PROMPT, args)
    for budget in args.budgets:
        _, lengths = texts(model, method=method, budget=budget, head_vocab=None, head_rows=rows)
        assert found[head, budget].lengths == lengths
    assert found[head, 32].lengths != [1] * (TOKENS - 1), "nothing was ever accepted"
