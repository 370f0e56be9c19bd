"""`/v1/completions`, `/v1/models`, `/tokenize` and `/health`."""

from __future__ import annotations

import numpy as np
import pytest
from servers import MAX_POSITIONS, NAME

PATH = "/v1/completions"
OPTIONS = {"max_tokens": 24, "temperature": 1.0, "seed": 3}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("form", ["text", "tokens"])
def test_text_is_that_of_the_python_api(server, model, stream, form):
    text = "The sea is"
    result = model.generate(text, raw=True, log_probs=1, **OPTIONS)
    prompt = text if form == "text" else model.tokenizer.encode(text)
    body = {"prompt": prompt, "logprobs": 1, **OPTIONS}
    if stream:
        choices = [frame["choices"][0] for frame in server.frames(PATH, **body)]
    else:
        choices = server.post(PATH, body).json()["choices"]
    assert "".join(choice["text"] for choice in choices) == result.text
    assert choices[-1]["finish_reason"] == result.finish_reason
    found = {key: [] for key in choices[0]["logprobs"]}
    for choice in choices:
        for key, values in choice["logprobs"].items():
            found[key] += values
    name = model.tokenizer.token_text
    assert found["tokens"] == [name(token) for token in result.token_ids]
    np.testing.assert_allclose(
        found["token_logprobs"], [x.log_prob for x in result.log_probs], atol=1e-4
    )
    assert [len(best) for best in found["top_logprobs"]] == [1] * len(result.token_ids)
    lengths = [len(token) for token in found["tokens"]]
    assert found["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]


def test_usage_of_a_stream(server):
    *_, last = server.frames(
        PATH, prompt="A", max_tokens=4, ignore_eos=True, stream_options={"include_usage": True}
    )
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4


def test_models(server):
    (listed,) = server.client.get("/v1/models").json()["data"]
    assert listed["id"] == NAME
    assert listed["max_model_len"] == MAX_POSITIONS
    assert server.client.get(f"/v1/models/{NAME}").json() == listed
    assert server.client.get("/v1/models/a/b").status_code == 404


def test_tokenize(server, model):
    answer = server.post("/tokenize", {"prompt": "Hello."}).json()
    tokens = model.tokenizer.encode("Hello.")
    assert answer == {"tokens": tokens, "count": len(tokens), "max_model_len": MAX_POSITIONS}
    messages = [{"role": "user", "content": "Hello."}]
    found = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert found == model.tokenizer.chat(messages)


def test_health(server):
    response = server.client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_in_each_chunk(server, path):
    message = {"role": "user", "content": "Hello."}
    asked = {"messages": [message]} if "chat" in path else {"prompt": "Hello."}
    asked |= {"max_tokens": 12, "ignore_eos": True, "temperature": 0}
    both = {"include_usage": True, "continuous_usage_stats": True}
    frames = server.frames(path, **asked, stream_options=both)
    counts = [frame["usage"]["completion_tokens"] for frame in frames]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    frames = server.frames(path, **asked, stream_options={"continuous_usage_stats": True})
    assert not any("usage" in frame for frame in frames)
