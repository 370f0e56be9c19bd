"""Answers are split into reasoning, content and calls, however they are cut into chunks."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from byte_tokens import END
from tool_models import RESPONSE_TEMPLATE, tool_tokenizer

from treeflash.config import DecodeConfig
from treeflash.decoding.loop import Step
from treeflash.serving.message_parser import MessageForm, MessageParser, ResponseTemplate
from treeflash.serving.response_templates import TOOL_CALL_PARSERS
from treeflash.text.stream import Assembler

TEMPLATE = ResponseTemplate(RESPONSE_TEMPLATE)
PROMPT = "<|start|>user: <think>Hi<|end|><|start|>assistant: "
ADD = '<call>{"name": "add", "arguments": {"a": 1, "b": [2]}}</call>'
SUB = '<call>{"name": "sub", "arguments": {}}</call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tool_tokenizer(tmp_path_factory.mktemp("tools"))


def chunks_of(tokenizer, ids, size, finish="length"):
    """The chunks of `size` tokens of an answer."""
    assembler = Assembler(None, tokenizer, (1,), DecodeConfig())
    for start in range(0, len(ids), size):
        reason = finish if start + size >= len(ids) else None
        yield assembler.add(Step(tuple(ids[start : start + size]), finish_reason=reason))


def read(tokenizer, text, size, *, prompt=PROMPT, form=True, finish="stop"):
    """Feed a text in chunks of `size` tokens; returns the parser and the added texts."""
    parser = MessageParser(MessageForm(TEMPLATE, prompt) if form else None, tokenizer)
    ids = tokenizer.encode(text) + [END] * (finish == "stop")
    changes = [change for x in chunks_of(tokenizer, ids, size, finish) for change in parser.feed(x)]
    assert "".join(x.text for x in changes if x.part.kind == "content") == parser.content
    assert "".join(x.text for x in changes if x.part.kind == "reasoning") == parser.reasoning
    opened = [x.part for x in changes if x.event == "open"]
    assert [part.call for part in opened if part.call is not None] == parser.calls
    assert opened == [x.part for x in changes if x.event == "close"] == parser.parts
    return parser, [x.text for x in changes if x.event == "text"]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_parts(tokenizer, size):
    parser, texts = read(tokenizer, f"<think>Why? Grüße.</think>Hello.{ADD}\n{SUB}", size)
    assert (parser.reasoning, parser.content) == ("Why? Grüße.", "Hello.")
    assert [(x.name, json.loads(x.arguments)) for x in parser.calls] == [
        ("add", {"a": 1, "b": [2]}),
        ("sub", {}),
    ]
    assert len({call.id for call in parser.calls}) == 2
    if size == 1:
        assert len(texts) > 15, "text is streamed"


@pytest.mark.parametrize("size", [1, 1000])
def test_special_tokens_that_the_template_lacks_are_left_out_as_in_other_texts(tokenizer, size):
    text = "<think>Wh<|stop|>y?</think>Hel<|stop|>lo."
    parser, _ = read(tokenizer, text, size)
    assert (parser.reasoning, parser.content) == ("Why?", "Hello.")
    plain, _ = read(tokenizer, text, size, form=False)
    assert plain.content == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize("size", [1, 1000])
def test_the_prompt_may_begin_the_reasoning(tokenizer, size):
    prompt = PROMPT + "<think>"
    assert MessageForm(TEMPLATE, prompt).in_reasoning
    assert not MessageForm(TEMPLATE, prompt + "</think>").in_reasoning
    assert not MessageForm(TEMPLATE, PROMPT).in_reasoning
    parser, _ = read(tokenizer, "Why?</think>Hello.", size, prompt=prompt)
    assert (parser.reasoning, parser.content) == ("Why?", "Hello.")
    thought = tokenizer.encode("Why?</think>")
    assert parser.count_reasoning([*thought, *tokenizer.encode("Hello.")]) == len(thought)
    assert parser.count_reasoning(thought[:-1]) == len(thought) - 1, "it was cut off"
    assert read(tokenizer, "Hello.", size)[0].count_reasoning(thought) == 0


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("end", ["</call> Sorry.", "", "</call>" + SUB])
def test_a_broken_call_becomes_content(tokenizer, size, end):
    broken = '{"name": "add", "arguments": {'
    parser, _ = read(tokenizer, f"Hello.{SUB}<call>{broken}{end}", size)
    assert [call.name for call in parser.calls] == ["sub"]
    assert parser.content.startswith(f"Hello.{broken}")
    assert parser.content.endswith(end.removeprefix("</call>"))


@pytest.mark.parametrize(
    "call",
    [
        '{"arguments": {}}',
        '{"name": "add", "arguments": "a"}',
        '{"name": "add", "arguments": [1]}',
        "[1]",
        '{"name": "add", "arguments": {"a": NaN}}',
        '{"name": "add", "arguments": {"a": -Infinity}}',
        '{"name": "add", "arguments": {"a": "\\ud800"}}',
        '{"name": "\\udfff", "arguments": {}}',
    ],
)
def test_what_is_not_a_call_is_content(tokenizer, call):
    """So is what no response could hold as JSON."""
    parser, _ = read(tokenizer, f"Hello.<call>{call}</call>", 6)
    assert parser.content == f"Hello.{call}"
    assert not parser.calls


@pytest.mark.parametrize("call", ["{", "[" * 100_000])
def test_a_broken_call_in_the_prompt_makes_all_of_the_answer_content(tokenizer, call):
    prompt = f"{PROMPT}<call>{call}</call>"
    parser, _ = read(tokenizer, f"Hello.{ADD}", 6, prompt=prompt)
    assert parser.content == f"Hello.{ADD}"
    assert not MessageForm(TEMPLATE, prompt).in_reasoning


def test_an_unfinished_call_is_kept(tokenizer):
    parser, _ = read(tokenizer, 'Hello.<call>{"name": "ad', 5, finish="length")
    assert parser.content == 'Hello.{"name": "ad'
    assert not parser.calls


BEGIN, SEP, DONE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
ALL, ALL_DONE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
V3 = f'{BEGIN}function{SEP}add\n```json\n{{"a": %d}}\n```{DONE}'
V31 = f'{BEGIN}add{SEP}{{"a": %d}}{DONE}'
PARSERS = {
    "hermes": (
        "<|im_start|>assistant\n",
        "Yes.",
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>',
    ),
    "qwen3_coder": (
        "<|im_start|>assistant\n",
        "Yes.",
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    ),
    "llama3_json": (
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "",
        '{"name": "add", "parameters": {"a": 1}}',
    ),
    "mistral": (
        "[/INST]",
        "Yes.",
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, '
        '{"name": "add", "arguments": {"a": 2}}]',
    ),
    "deepseek_v3": (
        "<｜Assistant｜>",
        "Yes.",
        f"{ALL}{V3 % 1}\n{V3 % 2}{ALL_DONE}",
    ),
    "deepseek_v31": ("<｜Assistant｜>", "Yes.", f"{ALL}{V31 % 1}{V31 % 2}{ALL_DONE}"),
    "gemma4": ("<|turn>model\n", "Yes.", "<|tool_call>call:add{a:1}<tool_call|>"),
}


def parse(template, prompt, tokenizer, text, size):
    schema = {"properties": {"a": {"type": "integer"}}}
    form = MessageForm(template, prompt, [{"function": {"name": "add", "parameters": schema}}])
    parser = MessageParser(form, tokenizer)
    parser.read(chunks_of(tokenizer, tokenizer.encode(text), size))
    return parser


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("name", TOOL_CALL_PARSERS)
def test_tool_call_parsers(tokenizer, name, size):
    prompt, text, calls = PARSERS[name]
    template, prompt = ResponseTemplate(TOOL_CALL_PARSERS[name]), f"<|user|>Hi{prompt}"
    parser = parse(template, prompt, tokenizer, text + calls, size)
    found = [(x.name, json.loads(x.arguments)) for x in parser.calls]
    assert found == [("add", {"a": i + 1}) for i in range(2 if "2" in calls else 1)]
    assert parser.content == text
    assert all(len(call.id) == 9 for call in parser.calls)
    plain = parse(template, prompt, tokenizer, "It is {here}.", size)
    assert (plain.content, plain.calls) == ("It is {here}.", [])


@pytest.mark.parametrize("name", TOOL_CALL_PARSERS)
def test_a_long_run_of_white_space_is_read_in_no_time(tokenizer, name):
    """The event loop reads it, so all other answers would wait."""
    template, prompt = ResponseTemplate(TOOL_CALL_PARSERS[name]), PARSERS[name][0]
    text = "Yes." + " \n" * 1000 + "No."
    started = time.process_time()
    parser = parse(template, prompt, tokenizer, text, 4)
    assert parser.content == text
    assert time.process_time() - started < 2


THOUGHT = "<think>Hm.</think>"
FAMILIES = {
    "qwen3": ("hermes", THOUGHT, "<|im_end|>"),
    "qwen3_5_moe": ("qwen3_coder", THOUGHT, "<|im_end|>"),
    "gemma4": ("gemma4", "<|channel>thought\nHm.<channel|>", "<turn|>"),
}
"""The form of a family's calls, a thought, and the end of an answer."""


@pytest.mark.parametrize("family", FAMILIES)
def test_families_whose_tokenizers_have_no_template(tokenizer, family, tmp_path):
    form, thought, end = FAMILIES[family]
    prompt, text, calls = PARSERS[form]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    plain = SimpleNamespace(transformers=SimpleNamespace(response_template=None))
    template = ResponseTemplate.find(plain, tmp_path)
    parser = parse(template, prompt, tokenizer, thought + text + calls + end, 1000)
    assert (parser.reasoning, parser.content) == ("Hm.", text)
    assert [x.name for x in parser.calls] == ["add"] * len(parser.calls) != []
    assert json.loads(parser.calls[0].arguments) == {"a": 1}


def test_without_a_template_everything_is_content(tokenizer):
    text = f"<think>Why?</think>{ADD}"
    parser, _ = read(tokenizer, text, 3, form=False)
    assert parser.content == text
