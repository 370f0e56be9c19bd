"""Comparisons along one text: the target is led along it, and walks count what decoding does."""

from __future__ import annotations

from argparse import Namespace
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
    """Tokens, and how many each iteration brought."""
    config = DecodeConfig(max_tokens=TOKENS, **options)
    first, *steps = decode(model.backend, model.tokenizer.chat(chat(PROMPT)), config)
    tokens = [*first.tokens, *(token for step in steps for token in step.tokens)]
    return tokens, [len(step.tokens) for step in steps]


def chat(prompt):
    return [{"role": "user", "content": prompt}]


@pytest.mark.parametrize("method", METHODS)
def test_the_target_is_led_along_a_text(method, module, model):
    root, *own = texts(model, method="ar")[0]
    led = module("one_text").OneText(model.backend)
    led.text = [root, *((token + 1) % model.backend.vocab_size for token in own)]
    assert texts(replace(model, backend=led), method=method, budget=8)[0] == led.text


@pytest.mark.parametrize("rows", ["auto", None, 4])
def test_a_walk_brings_what_decoding_does(rows, module, model):
    walks = module("walks")
    head = walks.Head(None, rows)
    args = Namespace(max_tokens=TOKENS, budgets=[2, 8, 32], heads=[head])
    found = walks.walk(model, PROMPT, args)
    for budget in args.budgets:
        _, lengths = texts(
            model, method="treeflash", budget=budget, head_vocab=None, head_rows=rows
        )
        assert found[head, budget].lengths == lengths
    assert found[head, 32].lengths != [1] * (TOKENS - 1), "nothing was ever accepted"
