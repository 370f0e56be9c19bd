"""The clients that people use, with one model and with several; nightly what is slow to import.

The packages of OpenAI, Anthropic and Ollama ask in every scenario of `test_protocols.py`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import ollama
import openai
import pytest
from scripted_model import reference_model
from servers import NAME, serving, wait_until
from several_models import NAMES
from tool_models import COLOUR, tool_model

from treeflash.commands import models as models_command
from treeflash.serving.ollama import duration

TOKENS = 12
USER = [{"role": "user", "content": "Hello."}]
SHORT = {"num_predict": TOKENS}
OPTIONS = {"max_tokens": TOKENS, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def texts(pairs):
    """Each model's answer, which the Python API gives."""
    return {
        name: reference_model(*folders).generate(USER, max_tokens=TOKENS).text
        for name, folders in pairs.items()
    }


@pytest.fixture
def several(serve_models):
    return serve_models()


@pytest.fixture
def client(several):
    with ollama.Client(several.url) as client:
        yield client


def loaded(client):
    return {model.model for model in client.ps().models}


def test_ollama(client, texts):
    assert [model.model for model in client.list().models] == [*NAMES]
    assert loaded(client) == set()
    for name in NAMES:
        for spelled in (name.upper(), f"{name}:latest"):
            answer = client.chat(spelled, USER, options=SHORT)
            assert answer.message.content == texts[name]
    assert loaded(client) == {*NAMES}
    with pytest.raises(ollama.ResponseError, match="model 'four' not found") as refused:
        client.chat("four", USER)
    assert refused.value.status_code == 404


def test_openais_helper_for_streams(server, model):
    expected = model.generate(USER, **OPTIONS).text
    stop = expected[2]  # it refuses answers that were cut off by their length
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        asked = {"model": NAME, "messages": USER, "stop": stop, **OPTIONS}
        with client.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion()
    assert final.choices[0].message.content == expected.partition(stop)[0]


def test_ollama_loads_and_puts_away(several, client, loads):
    assert client.generate("two").done_reason == "load"
    assert loaded(client) == {"two"}
    assert client.generate("two", keep_alive=0).done_reason == "unload"
    wait_until(lambda: loaded(client) == set())
    assert client.chat("two", []).done_reason == "load"
    client.chat("two", USER, options=SHORT, keep_alive=0)
    wait_until(lambda: loaded(client) == set())
    assert client.generate("One", keep_alive=0).done_reason == "unload", "it was not in memory"
    assert loads.counts == {"two": 2}
    metrics = several.client.get("/metrics").text
    assert 'treeflash:model_unloads_total{model="two",reason="request"} 2.0' in metrics


def test_ollama_tells_how_long_a_load_took(client, loads):
    loads.gates["two"] = threading.Event()
    with ThreadPoolExecutor(1) as clients:
        waiting = clients.submit(client.chat, "two", USER, options=SHORT)
        wait_until(lambda: loads.begun["two"])
        time.sleep(0.02)
        loads.gates["two"].set()
    answer = waiting.result()
    assert answer.total_duration > answer.load_duration > 20_000_000  # nanoseconds


def test_ollama_keeps_models_for_a_time(client):
    def left(name):
        (expires,) = [x.expires_at for x in client.ps().models if x.model == name]
        return expires - datetime.now(UTC)

    client.generate("two", keep_alive="5m")
    assert timedelta(minutes=4) < left("two") < timedelta(minutes=6)
    client.chat("two", USER, options=SHORT)
    assert timedelta(minutes=4) < left("two") < timedelta(minutes=6), "it is kept as it was"
    client.generate("two", keep_alive=-1)
    assert left("two") > timedelta(days=9999)
    client.generate("two", keep_alive=0.01)
    wait_until(lambda: loaded(client) == set())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[(300, 300), (-1, -1), (1.5, 1.5), ("300", 300), ("-1", -1), ("5m", 300), ("-1m", -60)],
        *[("1h30m", 5400), ("1.5h", 5400), ("250ms", 0.25), ("0", 0), ("0s", 0), ("+2s", 2)],
        *[("", None), ("soon", None), ("5 m", None), ("m", None), ("5mx", None), ("nan", None)],
    ],
)
def test_durations(text, seconds):
    assert duration(text) == (None if seconds is None else pytest.approx(seconds))


def test_the_command_that_lists_models(several, client, capsys):
    client.generate("two")
    assert models_command.main(["--server", several.url]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [*NAMES]
    assert ["in" in row for row in rows] == [False, True, False]
    assert models_command.main(["--server", several.url, "--json"]) == 0
    assert '"name": "two", "context": 511, "in_memory": true' in capsys.readouterr().out
    for url, says in ((f"{several.url}/x", "another program"), ("http://127.0.0.1:9", "no server")):
        assert models_command.main(["--server", url]) == 2
        assert says in capsys.readouterr().err


def llm(url, folder, *args):
    """Run the command `llm`, which knows the server's address alone; returns what it prints."""
    pytest.importorskip("llm_ollama")
    done = subprocess.run(
        [sys.executable, "-m", "llm", *args],
        env={**os.environ, "OLLAMA_HOST": url, "LLM_USER_PATH": str(folder)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


FEW = ("-o", "num_predict", str(TOKENS))


@pytest.mark.nightly
def test_llm_chooses_between_models(several, texts, tmp_path):
    for name in NAMES:
        said = llm(
            several.url, tmp_path, "-m", f"ollama/{name}", *FEW, "--hide-reasoning", "Hello."
        )
        assert said == texts[name].rstrip("\n")


@pytest.mark.nightly
def test_llm_speaks_to_ollama_alone(tmp_path):
    with serving(tool_model(tmp_path / "tools"), {"max_tokens": 64}) as server:

        def ask(*args):
            return llm(server.url, tmp_path, *args)

        def expected(*texts):
            """The server's answer to messages in turn, without reasoning."""
            roles = ("user", "assistant", "user")
            asked = [{"role": role, "content": x} for role, x in zip(roles, texts, strict=False)]
            body = {"messages": asked, "max_tokens": TOKENS, "reasoning_effort": "none"}
            answer = server.post("/v1/chat/completions", body).json()
            return answer["choices"][0]["message"]["content"].rstrip("\n")

        model, plain = ("-m", f"ollama/{NAME}"), ("-o", "think", "false")
        assert re.search(rf"{NAME} .*completion, thinking, tools", ask("ollama", "models"))
        assert f"Ollama: ollama/{NAME}" in ask("models")
        for stream in ((), ("--no-stream",)):
            first = ask(*model, *FEW, *plain, *stream, "Hello.")
            assert first == expected("Hello.")
            second = ask("--continue", *FEW, *plain, *stream, "And now?")
            assert second == expected("Hello.", first, "And now?")
        assert ask(*model, *FEW, "-o", "think", "true", "Hello.", "--hide-reasoning") == ""
        answer = ask(*model, "--schema", json.dumps(COLOUR), *plain, "A colour?")
        assert json.loads(answer)["colour"] in ("red", "blue")


@pytest.fixture(scope="module")
def expected(model):
    return [model.generate(USER, **{**OPTIONS, "seed": 3 + i}) for i in range(2)]


@pytest.fixture(scope="module")
def complete(server):
    # Or it fetches prices in the background, and reports failures amid the output of other tests.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    where = {"model": f"openai/{NAME}", "api_base": f"{server.url}/v1", "api_key": "none"}
    asked = {"messages": USER, "num_retries": 0, **where, **OPTIONS}
    return lambda **fields: litellm.completion(**asked | fields)


# Half a minute of imports. It sends what the other clients send.
@pytest.mark.nightly
class TestLiteLLM:
    def test_chat(self, complete, expected):
        answer = complete(n=2)
        assert [choice.message.content for choice in answer.choices] == [x.text for x in expected]

    def test_stream(self, complete, expected):
        chunks = list(complete(stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected[0].text

    def test_errors(self, complete):
        import litellm

        with pytest.raises(litellm.BadRequestError, match="max_tokens"):
            complete(max_tokens=-1)

    @pytest.mark.parametrize("provider", ["ollama", "ollama_chat"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_providers_of_ollama(self, complete, server, model, provider, stream):
        """They send their bodies without a content type."""
        prompt = USER if provider == "ollama_chat" else "### User:\nHello.\n\n"
        expected = model.generate(prompt, **OPTIONS).text
        answer = complete(model=f"{provider}/{NAME}", api_base=server.url, stream=stream)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
        assert text == expected


# It wraps the client of OpenAI, and takes long to import.
@pytest.mark.nightly
def test_langchain(server, expected):
    package = pytest.importorskip("langchain_openai")
    where = {"model": NAME, "base_url": f"{server.url}/v1", "api_key": "none"}
    chat = package.ChatOpenAI(**where, max_retries=0, **OPTIONS)
    tokens = len(expected[0].token_ids)
    answer = chat.invoke("Hello.")
    assert answer.content == expected[0].text
    assert answer.usage_metadata["output_tokens"] == tokens
    assert "".join(chunk.content for chunk in chat.stream("Hello.")) == expected[0].text
    answer = chat.bind(logprobs=True).invoke("Hello.")
    assert len(answer.response_metadata["logprobs"]["content"]) == tokens
