"""`/v1/completions`, `/v1/models`, `/tokenize` and `/health`."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pytest
from servers import MAX_POSITIONS, NAME, check_error

from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.serving.streaming import token_name
from treeflash.testing.pairs import combine

PATH = "/v1/completions"
OPTIONS = {"max_tokens": 24, "temperature": 1.0, "seed": 3}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prompt_of_tokens_and_the_offsets_of_its_answer(server, model, stream):
    tokens = model.tokenizer.encode("The sea is")
    result = model.generate("The sea is", raw=True, **OPTIONS)
    body = {"prompt": tokens, "logprobs": 1, **OPTIONS}
    if stream:
        choices = [frame["choices"][0] for frame in server.frames(PATH, **body)]
    else:
        choices = server.post(PATH, body).json()["choices"]
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
    body = {"prompt": prompts, "n": n, **OPTIONS}
    expected = [
        model.generate(text, raw=True, **{**OPTIONS, "seed": 3 + i}).text
        for text in TEXTS
        for i in range(n)
    ]
    found = [""] * len(expected)
    if stream:
        for frame in server.frames(PATH, **body):
            for choice in frame["choices"]:
                found[choice["index"]] += choice["text"]
    else:
        answer = server.post(PATH, body).json()
        found = [choice["text"] for choice in answer["choices"]]
        assert [choice["index"] for choice in answer["choices"]] == list(range(3 * n))
        lengths = [len(model.tokenizer.encode(text)) for text in TEXTS]
        assert answer["usage"]["prompt_tokens"] == sum(lengths)
    assert found == expected


def test_a_list_of_one_prompt(server):
    one, other = (server.complete(prompt, **OPTIONS).json() for prompt in (["The sea"], "The sea"))
    assert one["choices"] == other["choices"]


@pytest.mark.sample(4)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("text", TEXTS, ids=["short", "one", "long"])
@pytest.mark.parametrize("new", [0, 5])
def test_echo_with_log_probs_of_the_prompt(server, model, text, new, stream):
    server.complete(text, max_tokens=2)  # the prefix cache has the prompt now
    ids = model.tokenizer.encode(text)
    body = {"prompt": text, "echo": True, "logprobs": 2, "max_tokens": new, "ignore_eos": True}
    if stream:
        choices = [frame["choices"][0] for frame in server.frames(PATH, **body)]
    else:
        choices = server.post(PATH, body).json()["choices"]
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


def test_models(server):
    (listed,) = server.client.get("/v1/models").json()["data"]
    assert listed["id"] == NAME
    assert listed["max_model_len"] == MAX_POSITIONS
    assert server.client.get(f"/v1/models/{NAME}").json() == listed
    # The names of Anthropic's API.
    assert (listed["type"], listed["display_name"]) == ("model", NAME)
    assert datetime.fromisoformat(listed["created_at"]).timestamp() == listed["created"]
    assert server.client.get("/v1/models/a/b").status_code == 404


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
