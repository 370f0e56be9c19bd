"""The clients that people use choose between the models of one server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import anthropic
import ollama
import openai
import pytest
from scripted_model import reference_model
from servers import MAX_POSITIONS, wait_until
from several_models import NAMES

from treeflash.commands import models as models_command
from treeflash.serving.ollama import duration

TOKENS = 12
USER = [{"role": "user", "content": "Hello."}]
SHORT = {"num_predict": TOKENS}


@pytest.fixture(scope="module")
def expected(pairs):
    """Each model's answer, which the Python API gives."""
    return {
        name: reference_model(*folders).generate(USER, max_tokens=TOKENS).text
        for name, folders in pairs.items()
    }


@pytest.fixture
def server(serve_models):
    return serve_models()


@pytest.fixture
def client(server):
    return ollama.Client(server.url)


def loaded(client):
    return {model.model for model in client.ps().models}


def test_openai(server, expected):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        listed = {model.id: model.max_model_len for model in client.models.list()}
        assert listed == {name: MAX_POSITIONS - i for i, name in enumerate(NAMES)}
        for name in NAMES:
            asked = {"model": name, "messages": USER, "max_tokens": TOKENS}
            answer = client.chat.completions.create(**asked)
            assert (answer.model, answer.choices[0].message.content) == (name, expected[name])
            again = client.responses.create(
                model=name, input="Hello.", max_output_tokens=TOKENS
            )  # as Codex does
            assert again.output_text == expected[name]
        with pytest.raises(openai.NotFoundError, match="this server has One, two, org/three"):
            client.models.retrieve("four")


def test_anthropic(server, expected):
    with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as client:
        listed = {model.id: model.max_input_tokens for model in client.models.list()}
        assert listed == {name: MAX_POSITIONS - i for i, name in enumerate(NAMES)}
        for name in NAMES:
            answer = client.messages.create(model=name, messages=USER, max_tokens=TOKENS)
            assert (answer.model, answer.content[0].text) == (name, expected[name])
        with pytest.raises(anthropic.NotFoundError, match="the model 'four' does not exist"):
            client.messages.create(model="four", messages=USER, max_tokens=TOKENS)


def test_ollama(server, client, expected):
    assert [model.model for model in client.list().models] == [*NAMES]
    assert loaded(client) == set()
    for name in NAMES:
        for spelled in (name.upper(), f"{name}:latest"):
            answer = client.chat(spelled, USER, options=SHORT)
            assert answer.message.content == expected[name]
    assert loaded(client) == {*NAMES}
    with pytest.raises(ollama.ResponseError, match="model 'four' not found") as refused:
        client.chat("four", USER)
    assert refused.value.status_code == 404


def test_ollama_loads_and_puts_away(server, client, loads):
    assert client.generate("two").done_reason == "load"
    assert loaded(client) == {"two"}
    assert client.generate("two", keep_alive=0).done_reason == "unload"
    wait_until(lambda: loaded(client) == set())
    assert client.chat("two", []).done_reason == "load"
    client.chat("two", USER, options=SHORT, keep_alive=0)
    wait_until(lambda: loaded(client) == set())
    assert client.generate("One", keep_alive=0).done_reason == "unload", "it was not in memory"
    assert loads.counts == {"two": 2}
    metrics = server.client.get("/metrics").text
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
    with pytest.raises(ollama.ResponseError, match="keep_alive must be seconds or a text such as"):
        client.generate("two", keep_alive="soon")


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


def test_the_command_that_lists_models(server, client, capsys):
    client.generate("two")
    assert models_command.main(["--server", server.url]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [*NAMES]
    assert ["in" in row for row in rows] == [False, True, False]
    assert models_command.main(["--server", server.url, "--json"]) == 0
    assert '"name": "two", "context": 511, "in_memory": true' in capsys.readouterr().out
    for url, says in ((f"{server.url}/x", "another program"), ("http://127.0.0.1:9", "no server")):
        assert models_command.main(["--server", url]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.nightly
def test_llm(server, expected, tmp_path):
    """The command `llm`, with its plugin for Ollama."""
    pytest.importorskip("llm_ollama")
    variables = {"OLLAMA_HOST": server.url, "LLM_USER_PATH": str(tmp_path)}
    for name in NAMES:
        options = ("-o", "num_predict", str(TOKENS), "--hide-reasoning")
        done = subprocess.run(
            [sys.executable, "-m", "llm", "-m", f"ollama/{name}", *options, "Hello."],
            env={**os.environ, **variables}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.rstrip("\n") == expected[name].rstrip("\n")
