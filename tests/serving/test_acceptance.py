"""Drafts that are right far less often than in the drafter's evaluation are reported once."""

from __future__ import annotations

import json
import logging
import re
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from servers import serving
from stand_ins import stand_in

from treeflash.config import LoadConfig, SamplingConfig
from treeflash.decoding.loop import Step
from treeflash.decoding.transitions import DeferredTable, TransitionTable
from treeflash.drafters.evaluation import EVALUATION
from treeflash.drafters.folder import read_config
from treeflash.serving import acceptance as module
from treeflash.serving.acceptance import DRAFTS, EVERY, AcceptanceMonitor

GREEDY = SamplingConfig()
THINKING = "{% if enable_thinking %}<think>{% endif %}"


def drafted(token: int, made: list[int] | None = None) -> Step:
    """A step whose first drafted token is 7; its table is made when it is read."""
    array = np.full((1, 1, 1), 7, np.int32)

    def make() -> TransitionTable:
        if made is not None:
            made.append(token)
        return TransitionTable(array, np.zeros((1, 1, 1), np.float32), array - 8)

    return Step((token, 8), table=DeferredTable(make, depths=1))


def add(acceptance, right, *, sampling=GREEDY, length=100):
    """Add enough drafts that count, of which this share is right."""
    for n in range(DRAFTS * EVERY):
        acceptance.add(drafted(7 if n < right * EVERY else 9), sampling, length)


@pytest.fixture
def evaluated(model, tmp_path):
    """Make the pair of a drafter that was right for a share of first tokens in its evaluation."""

    def evaluated(share=0.8, max_length=1000, **loaded):
        record = {"max_length": max_length, "top1_marginal": [share]}
        (tmp_path / EVALUATION).write_text(json.dumps(record))
        return replace(model, drafter_folder=tmp_path, loaded=LoadConfig(**loaded))

    return evaluated


@pytest.fixture
def lines(caplog):
    """The lines of the log so far."""
    caplog.set_level(logging.WARNING, "treeflash.serving")
    return lambda: caplog.messages


def test_a_share_below_half_is_reported_once(evaluated, lines):
    acceptance = AcceptanceMonitor(evaluated(0.5))
    add(acceptance, DRAFTS // 4)
    assert (acceptance.share, acceptance.is_low, lines()) == (0.25, False, [])
    for _ in range(2):
        add(acceptance, DRAFTS // 4 - 1)
        assert acceptance.is_low
    (line,) = lines()
    assert "right in 24% of 128 drafts, and in the drafter's own evaluation it was in 50%" in line
    assert "\n" not in line
    add(acceptance, DRAFTS)
    assert not acceptance.is_low


def test_without_an_evaluation_there_is_a_floor(model, lines):
    acceptance = AcceptanceMonitor(model)
    add(acceptance, DRAFTS // 4)
    assert not acceptance.is_low
    add(acceptance, DRAFTS // 4 - 1)
    assert acceptance.is_low
    assert "a drafter that fits has more than 25%" in lines()[0]


def test_what_no_drafter_could_know_does_not_count(evaluated, lines):
    acceptance = AcceptanceMonitor(evaluated(0.8))
    add(acceptance, 0, sampling=SamplingConfig(temperature=1.5))
    for _ in range(DRAFTS * EVERY):
        acceptance.add(Step((9,)), GREEDY, 100)  # plain decoding, or a copy of the text
    assert (acceptance.share, lines()) == (None, [])
    add(acceptance, 0, sampling=SamplingConfig(temperature=1))
    assert len(lines()) == 1


def test_reasons_are_those_of_the_pair(evaluated, lines):
    model = evaluated()
    add(AcceptanceMonitor(model), 0)
    pair = f"treeflash doctor --target {model.folder} --drafter {model.drafter_folder}"
    first, *others = lines()[0].partition("each: ")[2].split("; ")
    assert first == f"a target that is a fine-tune, or not the drafter's ({pair})"
    assert not [reason for reason in others if not reason.startswith("thinking")]
    add(AcceptanceMonitor(evaluated(adapter="my lora", kv_bits=8, draft_bits=4)), 0, length=5000)
    line = lines()[1]
    for reason in (
        "contexts of 5000 tokens, after a training with 1000 (treeflash serve --target ",
        f"--drafter {model.drafter_folder} --draft-window 1000)",
        f"the adapter ({pair} --adapter 'my lora')",
        f"the quantised KV cache ({pair} --kv-bits 8)",
        f"the quantised drafter ({pair} --draft-bits 16)",
    ):
        assert reason in line


def test_thinking_is_a_reason_where_the_template_knows_it(evaluated, lines):
    model = evaluated()
    for template, thinking in ((THINKING, False), (THINKING, True), ("{{ messages }}", False)):
        tokenizer = copy(model.tokenizer)
        tokenizer.transformers = copy(tokenizer.transformers)
        tokenizer.transformers.chat_template, tokenizer.thinking = template, thinking
        add(AcceptanceMonitor(replace(model, tokenizer=tokenizer)), 0)
    first, *others = lines()
    assert "thinking, which was off in its training (treeflash doctor " in first
    assert " --thinking)" in first
    assert not [line for line in others if "without which" in line]


def test_a_head_that_drafts_depth_by_depth_is_checked_by_other_commands(evaluated, lines):
    shape = SimpleNamespace(has_marginals=False)
    model = replace(evaluated(), backend=SimpleNamespace(drafter_config=shape))
    add(AcceptanceMonitor(model), 0, length=5000)
    line = lines()[0]
    pair = f"--target {model.folder} --drafter {model.drafter_folder}"
    assert f"(treeflash evaluate --prompts FILE.jsonl {pair})" in line
    thinking = "--chat-template-args '{\"enable_thinking\": true}' PROMPT"
    assert f"(treeflash generate {pair} {thinking})" in line
    assert "doctor" not in line
    assert "--draft-window" not in line


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_a_quantised_target_is_a_reason(evaluated, lines, tmp_path, key):
    model, folder = evaluated(), tmp_path / "quantised"
    folder.mkdir()
    config = read_config(model.folder) | {key: {"bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    add(AcceptanceMonitor(replace(model, folder=folder)), 0)
    original = f"(treeflash doctor --target ORIGINAL --drafter {model.drafter_folder})"
    assert f"the quantised target, unlike the original {original}" in lines()[0]


def test_few_tables_are_made(model):
    acceptance, made = AcceptanceMonitor(model), list[int]()
    for _ in range(10 * EVERY):
        acceptance.add(drafted(7, made), GREEDY, 100)
    assert len(made) == 10


def test_a_server_says_it_in_its_log_and_its_metrics(evaluated, lines, monkeypatch):
    """A random drafter guesses nothing."""
    stand_in(monkeypatch, module, EVERY=1)
    with serving(evaluated(0.9)) as server:
        assert 'treeflash:low_acceptance{model="tiny"} 0.0' in server.client.get("/metrics").text
        prompts = ["An owl.", "Yes?", "1 + 1", "the end", "Q: why"]
        options = {"ignore_eos": True, "budget": 4, "max_tokens": 80}
        drafts = server.complete(prompts, **options).json()["usage"]["draft_tokens_details"]
        assert drafts["iterations"] > DRAFTS
        metrics = server.client.get("/metrics").text
    assert 'treeflash:low_acceptance{model="tiny"} 1.0' in metrics
    shares = dict(
        re.findall(r'treeflash:first_draft_acceptance\{model="tiny",of="(\w+)"\} (\S+)', metrics)
    )
    assert float(shares["latest"]) < 0.45
    assert float(shares["evaluation"]) == 0.9
    assert len(lines()) == 1
