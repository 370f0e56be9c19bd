"""`/v1/chat/completions` gives the texts of the Python API."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from servers import NAME

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


@pytest.mark.parametrize("options", [{}, SAMPLED, PENALISED], ids=["greedy", "sampled", "edited"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_text_is_that_of_the_python_api(server, model, options, stream):
    result = expected(model, **options)
    body = {"messages": MESSAGES, "max_tokens": 24, **options}
    if stream:
        frames = server.frames(PATH, **body)
        assert frames[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        choices = [frame["choices"][0] for frame in frames]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        reasons = [choice["finish_reason"] for choice in choices]
        assert reasons == [None] * (len(frames) - 1) + [result.finish_reason]
        assert len({frame["id"] for frame in frames}) == 1
    else:
        whole = server.post(PATH, body).json()
        assert whole["object"] == "chat.completion"
        assert whole["model"] == NAME
        text = whole["choices"][0]["message"]["content"]
        assert whole["choices"][0]["finish_reason"] == result.finish_reason
    assert text == result.text


@pytest.mark.parametrize("method", ["ar", "dflash", "ddtree", "treeflash"])
def test_method_and_budget_change_no_text(server, model, method):
    whole = server.post(
        PATH, {"messages": MESSAGES, "max_tokens": 24, "method": method, "budget": 6, **SAMPLED}
    ).json()
    assert whole["choices"][0]["message"]["content"] == expected(model, **SAMPLED).text
    assert (whole["usage"]["draft_tokens_details"]["drafted_tokens"] > 0) == (method != "ar")


def test_answers_have_successive_seeds(server, model):
    body = {"messages": MESSAGES, "max_tokens": 24, "n": 3, **SAMPLED}
    whole = server.post(PATH, body).json()
    texts = [expected(model, **{**SAMPLED, "seed": 7 + i}).text for i in range(3)]
    assert len(set(texts)) == 3
    assert [choice["message"]["content"] for choice in whole["choices"]] == texts
    streamed = ["", "", ""]
    for frame in server.frames(PATH, **body):
        for choice in frame["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


def test_without_a_seed_answers_differ(server):
    texts = {
        server.chat(temperature=2, max_tokens=16).json()["choices"][0]["message"]["content"]
        for _ in range(3)
    }
    assert len(texts) > 1


def test_stop_string(server, model):
    whole = expected(model, max_tokens=48, temperature=1, seed=3).text
    stop = whole[10:13]
    choice = server.post(
        PATH,
        {"messages": MESSAGES, "max_tokens": 48, "temperature": 1, "seed": 3, "stop": [stop, "no"]},
    ).json()["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_log_probs(server, model, stream):
    result = expected(model, log_probs=2)
    body = {"messages": MESSAGES, "max_tokens": 24, "logprobs": True, "top_logprobs": 2}
    if stream:
        choices = [frame["choices"][0] for frame in server.frames(PATH, **body)]
        found = [x for c in choices if "logprobs" in c for x in c["logprobs"]["content"]]
    else:
        found = server.post(PATH, body).json()["choices"][0]["logprobs"]["content"]
    name = model.tokenizer.token_text
    assert [x["token"] for x in found] == [name(token) for token in result.token_ids]
    np.testing.assert_allclose(
        [x["logprob"] for x in found], [x.log_prob for x in result.log_probs], atol=1e-4
    )
    for one, other in zip(found, result.log_probs, strict=True):
        assert [x["token"] for x in one["top_logprobs"]] == [name(token) for token, _ in other.top]
        assert one["bytes"] is None or bytes(one["bytes"]).decode() == one["token"]


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


def test_draft_trees(server):
    frames = server.frames(
        PATH,
        messages=MESSAGES,
        max_tokens=24,
        budget=8,
        stream_options={"include_draft_trees": True},
    )
    trees = [f["choices"][0]["draft_tree"] for f in frames if "draft_tree" in f["choices"][0]]
    assert [tree["iteration"] for tree in trees] == list(range(len(trees)))
    for before, tree in pairwise(trees):
        assert len(tree["nodes"]) == len(tree["parents"]) == 8
        assert tree["nodes"][0] == before["tokens"][-1]
        assert tree["path"][0] == 0
        accepted = [tree["nodes"][node] for node in tree["path"][1:]]
        assert accepted[: len(tree["tokens"])] == tree["tokens"][: len(accepted)]


def test_defaults_of_the_server(serve, model):
    server = serve(defaults={"max_tokens": 9, "temperature": 1.0, "seed": 5, "system": "Be brief."})
    choice = server.post(PATH, {"messages": MESSAGES[1:]}).json()["choices"][0]
    result = model.generate(MESSAGES, max_tokens=9, temperature=1.0, seed=5)
    assert choice["message"]["content"] == result.text


def test_messages_in_parts_and_of_developers(server):
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}]},
        {"role": "user", "content": [{"type": "text", "text": x} for x in ("Hel", "lo.")]},
    ]
    parts[1]["type"] = "text"  # as lm-eval sends it
    plain = [{"role": "system", "content": "Be "}, {"role": "user", "content": "Hello."}]
    both = [server.post(PATH, {"messages": m, "max_tokens": 8}).json() for m in (parts, plain)]
    assert both[0]["choices"] == both[1]["choices"]
    assert both[0]["usage"]["prompt_tokens"] == both[1]["usage"]["prompt_tokens"]


def test_chat_template_variables(server):
    messages = [{"role": "user", "content": "Hello."}]
    counts = [
        server.post("/tokenize", {"messages": messages, **more}).json()["count"]
        for more in ({}, {"chat_template_kwargs": {"enable_thinking": True}})
    ]
    assert counts[1] == counts[0] + len("<think>")


def test_max_completion_tokens(server):
    usage = server.chat(max_completion_tokens=5, max_tokens=5, ignore_eos=True).json()["usage"]
    assert usage["completion_tokens"] == 5
