"""`/v1/completions`, `/tokenize`, and what streams of OpenAI's APIs say of usage and progress."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bodies import CHAT, REQUESTS, TEXT
from servers import MAX_POSITIONS, check_error, serving

from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.serving.streaming import token_name
from treeflash.testing.pairs import combine

OPTIONS = {"max_tokens": 24, "temperature": 1.0, "seed": 3}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prompt_of_tokens_and_the_offsets_of_its_answer(server, model, stream):
    tokens = model.tokenizer.encode("The sea is")
    result = model.generate("The sea is", raw=True, **OPTIONS)
    choices = server.choices(TEXT, stream=stream, prompt=tokens, logprobs=1, **OPTIONS)
    assert "".join(choice["text"] for choice in choices) == result.text
    found = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    parts = [model.tokenizer.token_bytes(token) for token in result.token_ids]
    begun = [sum(byte & 0xC0 != 0x80 for byte in part) for part in parts]
    assert found == [sum(begun[:i]) for i in range(len(begun))]


TEXTS = ["The sea is", "A", "The river flows north, " * 8]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("form", "stream", "n"), combine(["texts", "tokens"], [False, True], [1, 2])
)
def test_lists_of_prompts(server, model, form, stream, n):
    """One choice for each prompt and answer, in order, as if each prompt was sent alone."""
    prompts = TEXTS if form == "texts" else [model.tokenizer.encode(text) for text in TEXTS]
    expected = [
        model.generate(text, raw=True, **{**OPTIONS, "seed": 3 + i}).text
        for text in TEXTS
        for i in range(n)
    ]
    choices = server.choices(TEXT, stream=stream, prompt=prompts, n=n, **OPTIONS)
    found = [""] * len(expected)
    for choice in choices:
        found[choice["index"]] += choice["text"]
    assert found == expected
    if not stream:
        assert [choice["index"] for choice in choices] == list(range(3 * n))
        usage = server.complete(prompts, n=n, max_tokens=1).json()["usage"]
        assert usage["prompt_tokens"] == sum(len(model.tokenizer.encode(text)) for text in TEXTS)


@pytest.mark.sample(4)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("text", TEXTS, ids=["short", "one", "long"])
@pytest.mark.parametrize("new", [0, 5])
def test_echo_with_log_probs_of_the_prompt(server, model, text, new, stream):
    server.complete(text, max_tokens=2)  # the prefix cache has the prompt now
    ids = model.tokenizer.encode(text)
    body = {"prompt": text, "echo": True, "logprobs": 2, "max_tokens": new, "ignore_eos": True}
    choices = server.choices(TEXT, stream=stream, **body)
    generated = model.generate(
        text, raw=True, max_tokens=max(new, 1), stop_token_ids=(), log_probs=2
    )
    answer = generated.text if new else ""
    assert "".join(choice["text"] for choice in choices) == text + answer
    assert choices[-1]["finish_reason"] == "length"
    found = {key: [] for key in choices[0]["logprobs"]}
    for choice in choices:
        for key, values in choice["logprobs"].items():
            found[key] += values
    whole = [*ids, *generated.token_ids][: len(ids) + new]
    assert found["tokens"] == [token_name(model.tokenizer, token) for token in whole]
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    with SequenceSession(model.backend, capacity=2 * len(whole) + 1) as session:
        logits = session.logits(DraftTree.chain(np.array(whole, np.int32))).astype(np.float64)
    expected = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    rows = np.arange(len(whole) - 1)
    np.testing.assert_allclose(found["token_logprobs"][1:], expected[rows, whole[1:]], atol=1e-4)
    for row, token, top in zip(expected, whole[1:], found["top_logprobs"][1:], strict=False):
        best = row[[*{*row.argsort()[-2:].tolist(), token}]]  # and the token itself
        np.testing.assert_allclose(sorted(top.values()), np.sort(best), atol=1e-4)


def test_parts_of_characters_are_written_as_bytes(server):
    """As OpenAI and vLLM write them."""
    body = {"echo": True, "logprobs": 0, "max_tokens": 0}
    found = server.complete("A\N{OTTER}é", **body).json()["choices"][0]["logprobs"]
    parts = [rf"bytes:\x{byte:02x}" for byte in "\N{OTTER}é".encode()]
    assert found["tokens"] == ["A", *parts]
    assert found["text_offset"] == [0, 1, 2, 2, 2, 2, 3]


def test_echo_of_several_answers_and_prompts(server):
    body = {"echo": True, "logprobs": 0, "max_tokens": 0, "n": 2}
    answer = server.complete(TEXTS, **body).json()
    assert [choice["text"] for choice in answer["choices"]] == [x for x in TEXTS for _ in range(2)]
    first, second = (answer["choices"][i]["logprobs"] for i in (4, 5))
    assert first == second
    assert answer["usage"]["completion_tokens"] == 0


def test_echo_without_log_probs(server, model):
    answer = server.complete("The sea", echo=True, **OPTIONS).json()["choices"][0]
    assert answer["text"] == "The sea" + model.generate("The sea", raw=True, **OPTIONS).text
    assert answer["logprobs"] is None


def test_scored_prompts_teach_the_budget_nothing(serve, model):
    """Their chains are not drafts."""
    server = serve()
    budget = model.adaptive_budgets.by_method["treeflash"]
    seen = []
    observe = budget.observe

    def record(trees, paths, lengths, *args, **named):
        seen.extend(lengths)
        observe(trees, paths, lengths, *args, **named)

    budget.observe = record
    try:
        server.complete(TEXTS[2], echo=True, logprobs=0, max_tokens=8, ignore_eos=True)
    finally:
        del budget.observe
    assert seen
    assert min(seen) >= len(model.tokenizer.encode(TEXTS[2]))


def test_detokenize(server, model):
    tokens = model.tokenizer.chat([{"role": "user", "content": "Hello."}])
    answer = server.post("/detokenize", {"tokens": tokens}).json()
    assert answer == {"prompt": model.tokenizer.decode_verbatim(tokens)}
    assert "Hello." in answer["prompt"]
    too_large = model.backend.vocab_size
    check_error(server.post("/detokenize", {"tokens": [too_large]}), 400, "outside the vocabulary")


def test_tokenize(server, model):
    answer = server.post("/tokenize", {"prompt": "Hello."}).json()
    tokens = model.tokenizer.encode("Hello.")
    assert answer == {"tokens": tokens, "count": len(tokens), "max_model_len": MAX_POSITIONS}
    messages = [{"role": "user", "content": "Hello."}]
    found = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert found == model.tokenizer.chat(messages)


def test_the_documentation_of_the_endpoints(server):
    response = server.client.get("/docs")
    assert response.status_code == 200
    assert '"/openapi.json"' in response.text or "'/openapi.json'" in response.text


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_usage_in_each_chunk(server, path):
    asked = REQUESTS[path] | {"max_tokens": 12, "ignore_eos": True, "temperature": 0}
    both = {"include_usage": True, "continuous_usage_stats": True}
    frames = server.frames(path, **asked, stream_options=both)
    counts = [frame["usage"]["completion_tokens"] for frame in frames]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    frames = server.frames(path, **asked, stream_options={"continuous_usage_stats": True})
    assert not any("usage" in frame for frame in frames)


# How much of a prompt has run, in streams that ask for it as llama.cpp's clients do.

STORY = "A long story about a river. " * 10
BODIES = {
    CHAT: {"messages": [{"role": "user", "content": STORY}]},
    TEXT: {"prompt": STORY},
}
FIVE = {"max_tokens": 5, "ignore_eos": True}


@pytest.fixture
def chunked(model):
    """A server that runs 64 tokens of a prompt at a time."""
    with serving(model) as server:
        scheduler = server.engine.scheduler
        scheduler.config = replace(scheduler.config, lone_prefill_chunk=64)
        yield server


def text_of(frames):
    choices = [choice for frame in frames for choice in frame["choices"]]
    return "".join(x.get("text") or x.get("delta", {}).get("content") or "" for x in choices)


@pytest.mark.parametrize("path", BODIES)
def test_progress_of_a_prompt(chunked, path):
    body = BODIES[path] | FIVE | {"stream_options": {"include_usage": True}}
    frames = chunked.frames(path, **body, return_progress=True)
    found = [frame for frame in frames if "prompt_progress" in frame]
    assert frames[: len(found)] == found, "tokens follow"
    total = frames[-1]["usage"]["prompt_tokens"]
    progress = [frame["prompt_progress"] for frame in found]
    assert [x["processed"] for x in progress] == list(range(64, total, 64))
    assert {(x["total"], x["cache"]) for x in progress} == {(total, 0)}
    times = [x["time_ms"] for x in progress]
    assert times == sorted(times)
    assert times[0] > 0
    empty = {"delta": {}} if path == CHAT else {"text": "", "logprobs": None}
    for frame in found:
        assert frame["choices"] == [{"index": 0, **empty, "finish_reason": None}]
    again = chunked.frames(path, **body)
    assert not any("prompt_progress" in frame for frame in again)
    assert text_of(frames) == text_of(again) != ""


def test_cached_tokens_count_as_processed(chunked):
    chunked.frames(TEXT, prompt=STORY, **FIVE)
    frames = chunked.frames(TEXT, prompt=STORY + "B" * 100, **FIVE, return_progress=True)
    (progress,) = (x["prompt_progress"] for x in frames if "prompt_progress" in x)
    assert progress["cache"] == len(STORY)
    assert progress["processed"] == len(STORY) + 64


def test_each_prompt_has_its_own(chunked):
    prompts = [STORY, STORY.upper()]
    frames = chunked.frames(TEXT, prompt=prompts, **FIVE, return_progress=True)
    told = [x for x in frames if "prompt_progress" in x]
    assert {frame["choices"][0]["index"] for frame in told} == {0, 1}
    assert len(text_of(frames)) > 0
