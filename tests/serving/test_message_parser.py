"""Answers are split into reasoning, content and calls, however they are cut into chunks."""

from __future__ import annotations

import json

import pytest
from tool_models import RESPONSE_TEMPLATE, tool_tokenizer

from treeflash.decoding.loop import Step
from treeflash.serving.message_parser import MessageForm, MessageParser
from treeflash.serving.response_templates import ResponseTemplate
from treeflash.testing.tokenizer import END
from treeflash.text.assembler import Chunk
from treeflash.text.detokenizer import TextStream

TEMPLATE = ResponseTemplate(RESPONSE_TEMPLATE["fields"], RESPONSE_TEMPLATE)
PROMPT = "<|start|>user: <think>Hi<|end|><|start|>assistant: "
ADD = '<call>{"name": "add", "arguments": {"a": 1, "b": [2]}}</call>'
SUB = '<call>{"name": "sub", "arguments": {}}</call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tool_tokenizer(tmp_path_factory.mktemp("tools"))


def read(tokenizer, text, size, *, prompt=PROMPT, form=True, finish="stop"):
    """Feed a text in chunks of so many tokens; returns the parser and all deltas."""
    parser = MessageParser(MessageForm(TEMPLATE, prompt) if form else None, tokenizer)
    ids = tokenizer.encode(text) + [END] * (finish == "stop")
    stream, deltas = TextStream(tokenizer), []
    for start in range(0, len(ids), size):
        part = tuple(ids[start : start + size])
        last = start + size >= len(ids)
        text = stream.push(part) + (stream.finish() if last else "")
        deltas += parser.feed(Chunk(text, part, Step(part), finish if last else None))
    assert "".join(x.text for x in deltas if x.kind == "content") == parser.content
    assert "".join(x.text for x in deltas if x.kind == "reasoning") == parser.reasoning
    assert [x.call for x in deltas if x.call is not None] == parser.calls
    return parser, deltas


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_parts(tokenizer, size):
    parser, deltas = read(tokenizer, f"<think>Why? Grüße.</think>Hello.{ADD}\n{SUB}", size)
    assert (parser.reasoning, parser.content) == ("Why? Grüße.", "Hello.")
    assert [(x.name, json.loads(x.arguments)) for x in parser.calls] == [
        ("add", {"a": 1, "b": [2]}),
        ("sub", {}),
    ]
    assert len({call.id for call in parser.calls}) == 2
    if size == 1:
        assert len(deltas) > 15, "text is streamed"


@pytest.mark.parametrize("size", [1, 1000])
def test_the_prompt_may_begin_the_reasoning(tokenizer, size):
    prompt = PROMPT + "<think>"
    assert MessageForm(TEMPLATE, prompt).reasoning
    assert not MessageForm(TEMPLATE, prompt + "</think>").reasoning
    assert not MessageForm(TEMPLATE, PROMPT).reasoning
    parser, _ = read(tokenizer, "Why?</think>Hello.", size, prompt=prompt)
    assert (parser.reasoning, parser.content) == ("Why?", "Hello.")


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("end", ["</call> Sorry.", "", "</call>" + SUB])
def test_a_broken_call_becomes_content(tokenizer, size, end):
    broken = '{"name": "add", "arguments": {'
    parser, _ = read(tokenizer, f"Hello.{SUB}<call>{broken}{end}", size)
    assert [call.name for call in parser.calls] == ["sub"]
    assert parser.content.startswith(f"Hello.{broken}")
    assert parser.content.endswith(end.removeprefix("</call>"))


@pytest.mark.parametrize("call", ['{"arguments": {}}', '{"name": "add", "arguments": "a"}', "[1]"])
def test_what_is_not_a_call_is_content(tokenizer, call):
    parser, _ = read(tokenizer, f"Hello.<call>{call}</call>", 6)
    assert parser.content == f"Hello.{call}"
    assert not parser.calls


def test_an_unfinished_call_is_kept(tokenizer):
    parser, _ = read(tokenizer, 'Hello.<call>{"name": "ad', 5, finish="length")
    assert parser.content == 'Hello.{"name": "ad'
    assert not parser.calls


def test_without_a_template_everything_is_content(tokenizer):
    text = f"<think>Why?</think>{ADD}"
    parser, _ = read(tokenizer, text, 3, form=False)
    assert parser.content == text
