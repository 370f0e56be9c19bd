"""A message's reasoning ends after its budget, at the token."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from servers import NAME, serving
from tool_models import CHAT_TEMPLATE, COLOUR, tool_model

from treeflash.config import DecodeConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.sampling import unpack
from treeflash.serving.thinking import ThinkingBudget

OPEN, CLOSE = "<think>", "</think>"
HELLO = [{"role": "user", "content": "Hello."}]
FORMAT = {"type": "json_schema", "schema": COLOUR}


@pytest.fixture(scope="module")
def model(tool_pair):
    """A random model that would reason for ever; a token has one byte."""
    return tool_pair


@pytest.fixture(scope="module")
def server(tool_server):
    return tool_server


@pytest.fixture
def limited(model):
    """A function that makes the constraint of a message."""

    def make(budget, opening, other=None):
        vocab_size = model.backend.vocab_size
        other = None if other is None else other()
        return ThinkingBudget(budget, opening, CLOSE, model.tokenizer, vocab_size, other)

    return make


def say(model, constraint, text):
    """Advance over a text, whose tokens must be allowed."""
    for token in model.tokenizer.encode_continuation(text):
        assert token in allowed(model, constraint)
        constraint.advance(token)


def allowed(model, constraint):
    return set(np.flatnonzero(unpack(constraint.allowed()[None], model.backend.vocab_size)[0]))


def forced(model, constraint):
    """The text that must follow."""
    ids = []
    while len(tokens := allowed(model, constraint)) == 1:
        ids += tokens
        constraint.advance(ids[-1])
    constraint.rollback(len(ids))
    return model.tokenizer.decode(ids)


def test_spaces_before_the_reasoning_take_no_memory(model, limited):
    constraint = limited(5, OPEN)
    (space,) = model.tokenizer.encode_continuation(" ")
    tracemalloc.start()
    for _ in range(3000):
        constraint.advance(space)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2 << 20, "each state would keep all spaces before it"
    say(model, constraint, f"{OPEN}12345")
    assert forced(model, constraint) == CLOSE


@pytest.mark.parametrize(
    ("opening", "text", "following"),
    [
        pytest.param("", "12345", CLOSE, id="begun by the prompt"),
        pytest.param("", "1234", "", id="room for one more"),
        pytest.param(OPEN, f"{OPEN}12345", CLOSE, id="begun by the model"),
        pytest.param(OPEN, f"\n{OPEN}12345", CLOSE, id="after white space"),
        pytest.param(OPEN, "1234567", "", id="no reasoning"),
        pytest.param(OPEN, "<thin1234567", "", id="another beginning"),
        pytest.param("", f"12{CLOSE}34567", "", id="ended by the model"),
        pytest.param("", "123</", CLOSE[2:], id="the end has begun"),
        pytest.param("", f"12345{CLOSE}6789", "", id="after the forced end"),
    ],
)
def test_the_end_is_forced_at_the_token(model, limited, opening, text, following):
    constraint = limited(5, opening)
    say(model, constraint, text)
    assert forced(model, constraint) == following
    assert forced(model, constraint) == following  # rolled back as often as it was advanced


def test_another_constraint_holds_too(model, limited):
    """A grammar whose reasoning is free obeys the budget, and the budget obeys the grammar."""

    class OnlyDigits:
        end_tokens = frozenset()

        def allowed(self):
            mask = np.zeros(-(-model.backend.vocab_size // 32), np.uint32)
            for token in model.tokenizer.encode_continuation("0123456789</think>"):
                mask[token // 32] |= np.uint32(1) << np.uint32(token % 32)
            return mask

        def advance(self, token): ...

        def rollback(self, tokens): ...

    constraint = limited(2, "", OnlyDigits)
    digits = set(model.tokenizer.encode_continuation("0123456789</think>"))
    assert allowed(model, constraint) == digits
    say(model, constraint, "12")
    assert forced(model, constraint) == CLOSE


def message(server, budget, **fields):
    thinking = {"type": "enabled", "budget_tokens": budget}
    body = {"model": NAME, "messages": HELLO, "max_tokens": 60, "thinking": thinking, **fields}
    response = server.post("/v1/messages", body)
    assert response.status_code == 200, response.text
    return response.json()


def test_messages_think_for_their_budget(server, model):
    """The thought is the beginning of the unlimited one, token for token."""
    short = message(server, 13)
    thought = short["content"][0]["thinking"]
    unlimited = server.chat(max_tokens=13, reasoning_effort="high").json()
    assert thought == unlimited["choices"][0]["message"]["reasoning_content"]
    asked = {"messages": HELLO, "max_tokens": 13, "reasoning_effort": "high"}
    frames = server.frames("/v1/chat/completions", **asked)
    parts = [frame["choices"][0]["delta"].get("reasoning_content", "") for frame in frames]
    assert "".join(parts) == thought
    assert len(list(filter(None, parts))) > 2
    assert [block["type"] for block in short["content"]] == ["thinking", "text"]
    assert short["usage"]["output_tokens"] == 60


def test_a_limit_changes_no_token_of_any_method(model):
    """Draft trees end where the reasoning must."""
    vocab_size = model.backend.vocab_size
    prompt_ids = model.tokenizer.chat(HELLO)
    texts = set()
    for method in ("ar", "ddtree", "treeflash"):
        config = DecodeConfig(method=method, budget=12, max_tokens=40)
        limit = ThinkingBudget(7, "", CLOSE, model.tokenizer, vocab_size)
        request = Request(prompt_ids=prompt_ids, config=config, constraint=limit)
        steps = decode(model.backend, request)
        texts.add(tuple(token for step in steps for token in step.tokens))
    (text,) = texts
    assert model.tokenizer.decode(text[7:15]) == CLOSE


def test_the_form_of_the_answer_holds_after_a_forced_end(server):
    found = message(server, 9, output_config={"format": FORMAT}, max_tokens=120)
    assert [block["type"] for block in found["content"]] == ["thinking", "text"]
    assert json.loads(found["content"][1]["text"])["colour"] in ("red", "blue")


def test_a_thought_that_the_model_may_begin_ends_after_its_budget(tmp_path):
    """Prompts of Qwen3 begin no thought."""
    before, _, _ = CHAT_TEMPLATE.partition("{% if enable_thinking")
    off = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    model = tool_model(tmp_path, chat_template=before + off)
    first, brace = (model.tokenizer.encode(text)[0] for text in "<{")
    with serving(model, {"logit_bias": {first: 30.0}}) as running:
        found = message(running, 9, output_config={"format": FORMAT}, max_tokens=120)
        thought, text = found["content"]
        assert thought["thinking"] == "<" * 8  # the ninth begins the end
        assert json.loads(text["text"])["colour"] in ("red", "blue")
        form = {"type": "json_schema", "json_schema": {"name": "paint", "schema": COLOUR}}
        fields = {"response_format": form, "logit_bias": {str(brace): 30}}
        found = running.chat(max_tokens=120, reasoning_effort="high", **fields).json()
    answer = found["choices"][0]["message"]
    assert json.loads(answer["content"])["colour"] in ("red", "blue")
    assert "reasoning_content" not in answer


def test_a_thought_whose_ends_are_unknown_has_no_limit(tmp_path):
    """The form of the answer holds from its first token on."""
    model = tool_model(tmp_path, response_template=None)
    with serving(model, tool_call_parser="llama3_json") as running:
        found = message(running, 9, output_config={"format": FORMAT}, max_tokens=120)
    (block,) = found["content"]
    assert json.loads(block["text"])["colour"] in ("red", "blue")
