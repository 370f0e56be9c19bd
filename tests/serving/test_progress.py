"""How much of a prompt has run, in streams that ask for it as llama.cpp's clients do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from servers import serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "A long story about a river. " * 10
BODIES = {
    CHAT: {"messages": [{"role": "user", "content": PROMPT}]},
    TEXT: {"prompt": PROMPT},
}
OPTIONS = {"max_tokens": 5, "ignore_eos": True}


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
    body = BODIES[path] | OPTIONS | {"stream_options": {"include_usage": True}}
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
    chunked.frames(TEXT, prompt=PROMPT, **OPTIONS)
    frames = chunked.frames(TEXT, prompt=PROMPT + "B" * 100, **OPTIONS, return_progress=True)
    (progress,) = (x["prompt_progress"] for x in frames if "prompt_progress" in x)
    assert progress["cache"] == len(PROMPT)
    assert progress["processed"] == len(PROMPT) + 64


def test_each_prompt_has_its_own(chunked):
    prompts = [PROMPT, PROMPT.upper()]
    frames = chunked.frames(TEXT, prompt=prompts, **OPTIONS, return_progress=True)
    told = [x for x in frames if "prompt_progress" in x]
    assert {frame["choices"][0]["index"] for frame in told} == {0, 1}
    assert len(text_of(frames)) > 0


def test_the_package_of_openai_reads_it(chunked):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{chunked.url}/v1", api_key="-", max_retries=0) as client:
        fields = {"model": "tiny", "stream": True, "extra_body": {"return_progress": True}}
        chunks = list(client.chat.completions.create(**BODIES[CHAT], max_tokens=5, **fields))
    assert chunks[0].prompt_progress["processed"] == 64
    assert any(chunk.choices[0].delta.content for chunk in chunks)
