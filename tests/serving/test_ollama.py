"""`/api/chat`, `/api/generate` and their neighbours, through the `ollama` package."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file
from servers import NAME, serving
from tool_models import tool_model

from treeflash.hub.sizes import parameter_count
from treeflash.low_bits import METHOD, LowBitFormat, StoredWeight
from treeflash.serving.model_facts import ModelFacts
from treeflash.serving.ollama import ChatRequest, OllamaOptions, human_number

ollama = pytest.importorskip("ollama")

HELLO = [{"role": "user", "content": "Hello."}]
SHORT = {"num_predict": 12}
FOUR_BITS = LowBitFormat(bits=4, scales=1, has_least=True, scale_dtype="float16")
SHAPES = [("down", "Q4_1", (64, 64)), ("out", "Q6_K", (96, 64)), ("up", "Q4_1", (64, 64))]
PACKED = {
    name: StoredWeight(name=kind, format=FOUR_BITS, shape=shape).document()
    for name, kind, shape in SHAPES
}


@pytest.fixture(scope="module")
def server(tool_server):
    return tool_server


@pytest.fixture(scope="module")
def client(server):
    with ollama.Client(host=server.url) as client:
        yield client


def test_lines_are_the_default_and_have_no_events(server):
    response = server.post("/api/chat", {"model": NAME, "messages": HELLO, "options": SHORT})
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert lines[-1]["done"]
    assert all(set(line) >= {"model", "created_at", "message", "done"} for line in lines)


def test_a_raw_prompt_has_no_template(client, server):
    found = client.generate(NAME, "Hello.", raw=True, options=SHORT)
    expected = server.complete("Hello.", max_tokens=12).json()["choices"][0]["text"]
    assert found.response == expected


def test_options_reach_the_scheduler(client, server):
    options = {"seed": 11, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
    penalties = {"repeat_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.2}
    found = client.generate(NAME, "Hello.", raw=True, options=SHORT | options | penalties)
    fields = options | penalties | {"max_tokens": 12}
    fields["repetition_penalty"] = fields.pop("repeat_penalty")
    expected = server.complete("Hello.", **fields).json()["choices"][0]["text"]
    assert found.response == expected
    assert expected != server.complete("Hello.", max_tokens=12).json()["choices"][0]["text"]


@pytest.mark.parametrize(
    ("options", "decoding"),
    [
        pytest.param(
            {"repeat_last_n": 0, "repeat_penalty": 1.2, "presence_penalty": 0.1},
            {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
            id="penalties over the last 0 tokens are off",
        ),
        pytest.param({"seed": -1, "num_predict": -1}, {}, id="a negative number sets nothing"),
    ],
)
def test_options_that_mean_something_else_here(options, decoding):
    assert OllamaOptions(**options).decoding() == decoding


def test_a_whole_number_may_be_a_float():
    """Home Assistant sends the context's length as 8192.0."""
    options = OllamaOptions(num_ctx=8192.0, top_k=9.0, num_predict=4.0, temperature=1.0)
    assert options.decoding() == {"top_k": 9, "max_tokens": 4, "temperature": 1.0}
    with pytest.raises(ValidationError, match="num_ctx"):
        OllamaOptions(num_ctx=8192.5)


def messages_of(*messages):
    """The messages that the chat template gets to see."""
    return ChatRequest(model=NAME, messages=[*HELLO, *messages]).conversation().messages


def test_thoughts_and_results_without_a_name_reach_the_chat_template():
    call = {"function": {"name": "stop", "arguments": {}}}
    answer = {"role": "assistant", "content": "Hi."}
    result = {"role": "tool", "content": "Done."}
    found = messages_of(answer | {"thinking": "Who?", "tool_calls": [call | {"index": 0}]}, result)
    answer["reasoning_content"] = "Who?"
    answer["tool_calls"] = [{"id": "call_1_0", "type": "function", **call}]
    assert found == [*HELLO, answer, result | {"tool_call_id": "call_1_0"}]


def test_fields_that_clients_send_beside_the_options_change_nothing():
    """Vercel's AI SDK sends these, and no content beside calls."""
    call = {"function": {"name": "stop", "arguments": {}}}
    found = messages_of(
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Done."},
    )
    assert found[1]["content"] == ""
    beside = {"tool_choice": "auto", "max_output_tokens": 9, "temperature": 1, "top_p": 0.5}
    assert ChatRequest(model=NAME, messages=HELLO, **beside).asked() == {}


def test_results_without_an_id_answer_the_calls_that_have_none_yet():
    calls = [{"id": id, "function": {"name": "stop", "arguments": {}}} for id in ("a", "b", "c")]
    result = {"role": "tool", "content": "Done."}
    found = messages_of(
        {"role": "assistant", "tool_calls": calls}, result | {"tool_call_id": "b"}, result, result
    )
    assert [x["tool_call_id"] for x in found[2:]] == ["b", "a", "c"]


MACHINE = {"num_ctx": 4096, "num_gpu": 99, "num_thread": 2, "use_mmap": True, "num_batch": 2}
MACHINE |= {"main_gpu": 1, "numa": True, "num_keep": 5, "draft_num_predict": 4}
MACHINE |= {"use_mlock": True, "low_vram": True, "penalize_newline": True, "typical_p": 1.0}
MACHINE |= {"tfs_z": 1.0, "f16_kv": True, "logits_all": False}


def test_options_of_a_machine_change_nothing(client):
    plain = client.generate(NAME, "Hello.", raw=True, options=SHORT)
    found = client.generate(NAME, "Hello.", raw=True, options=SHORT | MACHINE, keep_alive="5m")
    assert found.response == plain.response


def test_the_only_model_stays_loaded(client):
    assert client.generate(NAME, keep_alive=0).done_reason == "load"
    assert client.chat(NAME, [], keep_alive=0).done_reason == "load"
    assert [model.model for model in client.ps().models] == [NAME]


def test_what_clients_in_go_send(server):
    """They write all fields of a request, those that are not set as empty."""
    asked = {"model": NAME, "system": "", "template": ""}
    shown = server.post("/api/show", {**asked, "verbose": False, "options": None, "name": ""})
    assert shown.json()["details"]["family"] == "llama"
    for model in ({}, {"model": ""}):  # older clients name the model so
        assert server.post("/api/show", {**model, "name": NAME}).json() == shown.json()
    asked |= {"prompt": "Hello.", "suffix": "", "context": [], "stream": False, "think": False}
    options = {**SHORT, "low_vram": False, "use_mlock": True, "mirostat": 0, "mirostat_tau": 5.0}
    found = server.post("/api/generate", {**asked, "options": options})
    assert found.json()["eval_count"] == 12


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "bfloat16"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": METHOD, "modules": PACKED}}, "Q4_1"),
    ],
)
def test_the_precision_of_most_weights(tmp_path, settings, expected):
    config = {"model_type": "llama", "dtype": "bfloat16", "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    assert ModelFacts.of_folder(tmp_path, None, images=False).precision == expected


def test_what_is_told_about_a_model(client, server):
    target = server.engine.model.folder / "model.safetensors"
    count = sum(weights.size for weights in load_file(target).values())
    shown = client.show(f"{NAME}:latest")
    assert shown.modelinfo["general.parameter_count"] == count
    assert shown.modelinfo["general.basename"] == NAME
    assert shown.modelinfo["llama.context_length"] == server.engine.model.backend.max_positions
    assert set(shown.capabilities) == {"completion", "tools", "thinking"}
    (listed,) = client.list().models
    assert listed.model == NAME
    assert listed.size == target.stat().st_size
    assert listed.details.parameter_size == shown.details.parameter_size == human_number(count)
    (loaded,) = client.ps().models
    assert loaded.size == listed.size
    assert loaded.context_length == server.engine.model.backend.max_positions
    assert loaded.expires_at > datetime.now(UTC) + timedelta(days=9999), "it is never unloaded"
    assert loaded.size_vram == 0, "it is on a CPU"


@pytest.mark.parametrize(
    ("count", "text"),
    [(134_515_008, "134.52M"), (7_000_000_000, "7B"), (1_543_714_304, "1.5B"), (960, "960")],
)
def test_numbers_of_parameters(count, text):
    assert human_number(count) == text


def test_quantised_weights_have_no_count(tmp_path):
    """Several weights are packed into one number of the file."""
    save_file({"a": np.zeros((2, 3), np.uint32)}, tmp_path / "model.safetensors")
    assert parameter_count(tmp_path) is None
    save_file({"a": np.zeros((2, 3), np.float16)}, tmp_path / "model.safetensors")
    assert parameter_count(tmp_path) == 6


def test_a_digest_is_of_the_model(client, server, tmp_path):
    """Applications remember the capabilities of a model by it, also when the server has another."""
    (listed,) = client.list().models
    assert len(listed.digest) == 64
    assert client.list().models[0].digest == listed.digest
    with serving(tool_model(tmp_path, response_template=None)) as other:
        (again,) = other.client.get("/api/tags").json()["models"]
        assert "tools" not in other.post("/api/show", {"model": NAME}).json()["capabilities"]
    assert "tools" in client.show(NAME).capabilities
    assert again["digest"] != listed.digest


def test_the_version(server):
    """Editors refuse a server whose version of Ollama's API is too old."""
    from treeflash import __version__

    found = server.client.get("/api/version").json()
    assert tuple(map(int, found["version"].split("."))) >= (0, 6, 4)
    assert found["treeflash"] == __version__
