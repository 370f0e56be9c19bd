"""`/v1/chat/completions` gives the texts of the Python API."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from servers import serving, wait_until

from treeflash.config import METHODS
from treeflash.decoding.adaptive_budget import AdaptiveBudget, AdaptiveBudgets
from treeflash.serving.chat import _delta
from treeflash.serving.message_parser import MessagePart, PartChange, ToolCall
from treeflash.serving.schemas import ImageURL, Message
from treeflash.serving.streaming import frame, json_line
from treeflash.testing.costs import SteadyCosts

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "Rhine"},
    {"role": "user", "content": "And another."},
]
PATH = "/v1/chat/completions"
SAMPLED = {"temperature": 1.5, "seed": 7, "top_p": 0.9, "top_k": 40, "min_p": 0.001}
PENALISED = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "repetition_penalty": 1.2,
    "logit_bias": {"50": 3.0, "70": -4.0},
}


def expected(model, **options):
    options = {"max_tokens": 24, **options}
    if "logit_bias" in options:
        options["logit_bias"] = {int(t): x for t, x in options["logit_bias"].items()}
    return model.generate(MESSAGES, **options)


@pytest.mark.parametrize("method", ["ar", "dflash", "ddtree", "treeflash"])
def test_method_and_budget_change_no_text(server, model, method):
    options = SAMPLED | PENALISED
    body = {"messages": MESSAGES, "max_tokens": 24, "method": method, "budget": 6, **options}
    whole = server.post(PATH, body).json()
    assert whole["choices"][0]["message"]["content"] == expected(model, **options).text
    assert (whole["usage"]["draft_tokens_details"]["drafted_tokens"] > 0) == (method != "ar")


def test_answers_have_successive_seeds(server, model):
    body = {"messages": MESSAGES, "max_tokens": 24, "n": 3, **SAMPLED}
    texts = [expected(model, **{**SAMPLED, "seed": 7 + i}).text for i in range(3)]
    assert len(set(texts)) == 3
    assert [x["message"]["content"] for x in server.choices(PATH, **body)] == texts
    streamed = ["", "", ""]
    for choice in server.choices(PATH, stream=True, **body):
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


def test_the_frames_of_a_chat(server):
    frames = server.frames(PATH, messages=MESSAGES, max_tokens=4, ignore_eos=True)
    choices = [frame["choices"][0] for frame in frames]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [x["finish_reason"] for x in choices] == [None] * (len(frames) - 1) + ["length"]
    assert all(x["delta"] for x in choices[:-1]), "no chunk says nothing"
    assert len({frame["id"] for frame in frames}) == 1


def test_the_seed_after_the_largest_is_0(server, model):
    body = {"messages": MESSAGES, "max_tokens": 12, "n": 2, **SAMPLED, "seed": 2**64 - 1}
    second = server.post(PATH, body).json()["choices"][1]["message"]["content"]
    assert second == expected(model, **{**SAMPLED, "seed": 0, "max_tokens": 12}).text


def test_the_frames_of_a_stream_are_lines_to_every_client(server):
    """Python's `splitlines`, with which some read streams, knows more line breaks than JSON."""
    data = {"text": "a\x85b\u2028c\u2029d é"}
    (line,) = json_line(data).decode().splitlines()
    begin, end = frame(data).decode().splitlines()
    assert json.loads(line) == json.loads(begin.removeprefix("data: ")) == data
    assert not end
    assert "é" in line


@pytest.mark.parametrize("fields", [{}, {"seed": -1}], ids=str)
def test_without_a_seed_answers_differ(server, fields):
    answers = [server.chat(temperature=2, max_tokens=16, **fields).json() for _ in range(4)]
    texts = {answer["choices"][0]["message"]["content"] for answer in answers}
    assert len(texts) == 4


def test_other_negative_seeds_are_64_bits_with_a_sign(server, model):
    body = {"messages": MESSAGES, "max_tokens": 12, **SAMPLED, "seed": -2}
    found = server.post(PATH, body).json()["choices"][0]["message"]["content"]
    assert found == expected(model, **{**SAMPLED, "seed": 2**64 - 2, "max_tokens": 12}).text


def test_log_probs_have_the_bytes_of_tokens(server):
    choice = server.chat(max_tokens=24, logprobs=True, temperature=1, seed=3).json()["choices"][0]
    for one in choice["logprobs"]["content"]:
        part = bytes(one["bytes"])
        escaped = "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)
        assert one["token"] in (part.decode(errors="replace"), escaped)
        assert "\ufffd" not in one["token"]
        assert one["top_logprobs"] == []


def test_created_is_the_time_of_the_answer(server):
    for ask in (server.chat, server.complete):
        before = int(time.time())
        assert before <= ask(max_tokens=1).json()["created"] <= time.time()


def test_usage(serve, model):
    body = {"messages": MESSAGES, "max_tokens": 24, "budget": 8}
    server = serve()
    usage = server.post(PATH, body).json()["usage"]
    result = expected(model, budget=8)
    assert usage["prompt_tokens"] == result.prompt_tokens
    assert usage["completion_tokens"] == len(result.token_ids)
    assert usage["total_tokens"] == result.prompt_tokens + len(result.token_ids)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    drafts = usage["draft_tokens_details"]
    assert drafts["iterations"] == len(result.accepted_lengths)
    assert drafts["drafted_tokens"] == 7 * drafts["iterations"]
    assert 0 < drafts["accepted_tokens"] < drafts["drafted_tokens"]
    *_, last = server.frames(PATH, **body, stream_options={"include_usage": True})
    assert last["choices"] == []
    usage["prompt_tokens_details"]["cached_tokens"] = result.prompt_tokens - 1
    assert last["usage"] == usage


def trees_of(server, **fields):
    options = {"include_draft_trees": True}
    choices = server.choices(PATH, stream=True, messages=MESSAGES, stream_options=options, **fields)
    return [choice["draft_tree"] for choice in choices if "draft_tree" in choice]


def test_draft_trees(server):
    trees = trees_of(server, max_tokens=24, budget=8)
    assert [tree["iteration"] for tree in trees] == list(range(len(trees)))
    for before, tree in pairwise(trees):
        assert len(tree["nodes"]) == len(tree["parents"]) == 8
        assert tree["nodes"][0] == before["tokens"][-1]
        assert tree["path"][0] == 0
        accepted = [tree["nodes"][node] for node in tree["path"][1:]]
        assert accepted[: len(tree["tokens"])] == tree["tokens"][: len(accepted)]


@pytest.mark.parametrize(("budget", "paused"), [("auto", True), (6, False)])
def test_a_paused_draft_is_told(model, budget, paused):
    """Only where the budget decides."""
    pausing = AdaptiveBudget(SteadyCosts({1: 1.0, 8: 1.0}))
    pausing.pace(1).drafting.left = 100
    budgets = AdaptiveBudgets(by_method=dict.fromkeys(METHODS, pausing))
    without_copies = {"suffix": False}
    with serving(replace(model, adaptive_budgets=budgets), without_copies) as server:
        trees = trees_of(server, max_tokens=8, budget=budget)
        metrics = server.client.get("/metrics").text
    assert 'treeflash:drafting{model="tiny",state="paused"} 1.0' in metrics
    assert [tree.get("paused", False) for tree in trees[1:]] == [paused] * (len(trees) - 1)
    assert "paused" not in trees[0]


def test_defaults_of_the_server(serve, model):
    server = serve(defaults={"max_tokens": 9, "temperature": 1.0, "seed": 5, "system": "Be brief."})
    choice = server.post(PATH, {"messages": MESSAGES[1:]}).json()["choices"][0]
    result = model.generate(MESSAGES, max_tokens=9, temperature=1.0, seed=5)
    assert choice["message"]["content"] == result.text
    own = [{"role": "system", "content": "Be wordy!!"}, *MESSAGES[1:]]
    counts = [
        server.post("/tokenize", {"messages": messages}).json()["count"]
        for messages in (MESSAGES, MESSAGES[1:], own)
    ]
    assert counts[0] == counts[1] == counts[2] - 1, "it stands in for a system message"


def test_messages_in_parts_and_of_developers(server):
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}]},
        {"role": "user", "content": [{"type": "text", "text": x} for x in ("Hel", "lo.")]},
    ]
    parts[0]["content"][0]["prompt_cache_breakpoint"] = {"mode": "explicit", "ttl": "30m"}
    parts[1]["type"] = "text"  # as lm-eval sends it
    parts[1] |= {"annotations": [], "refusal": None, "audio": None}  # fields of OpenAI's messages
    plain = [{"role": "system", "content": "Be "}, {"role": "user", "content": "Hello."}]
    both = [server.post(PATH, {"messages": m, "max_tokens": 8}).json() for m in (parts, plain)]
    assert both[0]["choices"] == both[1]["choices"]
    assert both[0]["usage"]["prompt_tokens"] == both[1]["usage"]["prompt_tokens"]


def test_what_clients_add_to_messages_that_they_send_back():
    """OpenAI's package, Copilot in VS Code, and clients of OpenRouter."""
    function = {"name": "paint", "arguments": "{}"}
    call = {"id": "a", "type": "function", "function": function}
    plain = {
        "role": "assistant",
        "content": [{"type": "text", "text": "Hi."}],
        "tool_calls": [call],
    }
    kept = {"type": "ephemeral"}
    sent = {
        **{**plain, "annotations": [], "parsed": {"a": [1]}, "copilot_cache_control": kept},
        **{"cot_id": "b", "cot_summary": "Hm.", "reasoning_details": [{"type": "text"}]},
        "content": [{**plain["content"][0], "cache_control": kept}],
        "tool_calls": [{**call, "function": {**function, "parsed_arguments": {}}}],
    }
    assert Message(**sent).template() == Message(**plain).template()
    for name in ("reasoning", "reasoning_content"):
        found = Message(role="assistant", content="Hi.", **{name: "Hm."}).template()
        assert found["reasoning_content"] == "Hm."
    image = {"url": "data:image/png;base64,AA=="}
    assert ImageURL(**image, media_type="image/png").url == image["url"]


@pytest.mark.parametrize(
    ("thinks", "fields"),
    [
        (False, {}),
        (True, {"chat_template_kwargs": {"enable_thinking": True}}),
        (False, {"reasoning_effort": "none"}),
        (False, {"reasoning_effort": "minimal"}),
        (True, {"reasoning_effort": "low"}),
        (True, {"reasoning_effort": "high"}),
        (False, {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}),
    ],
)
def test_what_turns_reasoning_on(server, model, thinks, fields):
    prompt = model.tokenizer.chat([{"role": "user", "content": "Hello."}])
    usage = server.chat(max_tokens=1, **fields).json()["usage"]
    assert usage["prompt_tokens"] == len(prompt) + thinks * len("<think>")


def test_calls_of_one_chunk_are_numbered_in_order():
    calls = [ToolCall(id=name, name=name, arguments="{}") for name in ("first", "second", "third")]
    changes = [
        PartChange("open", MessagePart(index=i, kind="call", call=x)) for i, x in enumerate(calls)
    ]
    delta = _delta(SimpleNamespace(calls=calls), changes[1:])
    found = [(call["index"], call["function"]["name"]) for call in delta["tool_calls"]]
    assert found == [(1, "second"), (2, "third")]


def test_max_completion_tokens(server):
    assert server.chat(max_completion_tokens=1).json()["usage"]["completion_tokens"] == 1
    for more in ({}, {"max_tokens": 5}):
        usage = server.chat(max_completion_tokens=5, ignore_eos=True, **more).json()["usage"]
        assert usage["completion_tokens"] == 5


NOTHING = {
    "metadata": {"run": "1"},
    "modalities": ["text"],
    "prediction": {"type": "content", "content": "The sea"},
    "prompt_cache_key": "a",
    "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "none",
    "safety_identifier": "b",
    "service_tier": "auto",
    "store": False,
    "return_progress": False,
    "top_k": -1,
    "user": "x",
    "verbosity": "low",
    # added by vllm-router
    "include_reasoning": True,
    "no_stop_trim": False,
    "return_hidden_states": False,
    "separate_reasoning": True,
    "skip_special_tokens": True,
    "stream_reasoning": True,
}


@pytest.mark.parametrize("name", NOTHING)
def test_fields_that_change_nothing(server, name):
    plain, given = server.chat(max_tokens=8), server.chat(max_tokens=8, **{name: NOTHING[name]})
    assert given.status_code == 200, given.text
    assert given.json()["choices"] == plain.json()["choices"]


def test_names_of_participants(server):
    message = {"role": "user", "name": "ann", "content": "Hello."}
    assert server.post(PATH, {"messages": [message], "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_line_in_the_log_for_each_request(server, caplog, stream):
    with caplog.at_level("INFO", "treeflash.serving"):
        server.chat(max_tokens=6, ignore_eos=True, n=2, stream=stream)
        wait_until(lambda: "tokens/s" in caplog.text)
    (line,) = [
        record.getMessage() for record in caplog.records if record.name == "treeflash.serving"
    ]
    assert re.fullmatch(
        r"/v1/chat/completions: \d+ prompt tokens \(\d+ cached\), 12 new tokens in [0-9.]+ s, "
        r"[0-9.]+ tokens/s, [0-9.]+ tokens per iteration, length, length",
        line,
    ), line
