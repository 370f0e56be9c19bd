"""The clients that people use, with one model and with several; nightly what is slow to import.

The packages of OpenAI, Anthropic and Ollama ask in every scenario of `test_protocols.py`.
"""

from __future__ import annotations

import os
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
from servers import NAME, wait_until
from several_models import NAMES

from treeflash.commands import models as models_command
from treeflash.serving.ollama import duration

TOKENS = 12
USER = [{"role": "user", "content": "Hello."}]
SHORT = {"num_predict": TOKENS}
OPTIONS = {"max_tokens": TOKENS, "temperature": 1.0, "seed": 3}


@pytest.fixture
def several(serve_models):
    return serve_models()


@pytest.fixture
def client(several):
    with ollama.Client(several.url) as client:
        yield client


def loaded(client):
    return {model.model for model in client.ps().models}


def test_openais_helper_for_streams(server, model):
    expected = model.generate(USER, **OPTIONS).text
    stop = expected[2]  # it refuses answers that were cut off by their length
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        asked = {"model": NAME, "messages": USER, "stop": stop, **OPTIONS}
        with client.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion()
    assert final.choices[0].message.content == expected.partition(stop)[0]


def test_ollama_loads_and_puts_away(several, client, loads):
    assert client.generate("two:latest").done_reason == "load"
    assert loaded(client) == {"two"}
    assert client.generate("TWO:latest", keep_alive=0).done_reason == "unload"
    wait_until(lambda: loaded(client) == set())
    assert client.chat("two", []).done_reason == "load"
    client.chat("Two:latest", USER, options=SHORT, keep_alive=0)
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


# A process for each question. It wraps the client of Ollama.
@pytest.mark.nightly
def test_llm(several, pairs, tmp_path):
    few = ("-o", "num_predict", str(TOKENS), "--hide-reasoning")
    for name in NAMES:
        said = llm(several.url, tmp_path, "-m", f"ollama/{name}", *few, "Hello.")
        text = reference_model(*pairs[name]).generate(USER, max_tokens=TOKENS).text
        assert said == text.rstrip("\n")
    said = llm(several.url, tmp_path, "--continue", *few, "--no-stream", "And now?")
    answer = {"role": "assistant", "content": text}
    turns = [*USER, answer, {"role": "user", "content": "And now?"}]
    body = {"model": name, "messages": turns, "max_tokens": TOKENS}
    answer = several.post("/v1/chat/completions", body).json()
    assert said == answer["choices"][0]["message"]["content"].rstrip("\n")


# Half a minute of imports. It sends what the other clients send.
@pytest.mark.nightly
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("provider", ["openai", "ollama", "ollama_chat"])
def test_litellm(server, model, monkeypatch, provider, stream):
    """For Ollama it sends bodies without a content type."""
    # Or it fetches prices in the background, and reports failures amid the output of other tests.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    base = f"{server.url}/v1" if provider == "openai" else server.url
    where = {"model": f"{provider}/{NAME}", "api_base": base, "api_key": "none", "num_retries": 0}
    answer = litellm.completion(messages=USER, stream=stream, **where, **OPTIONS)
    choices = [chunk.choices[0] for chunk in (answer if stream else [answer])]
    parts = [choice.delta if stream else choice.message for choice in choices]
    prompt = "### User:\nHello.\n\n" if provider == "ollama" else USER
    expected = model.generate(prompt, **OPTIONS).text
    assert "".join(part.content or "" for part in parts) == expected


# It wraps the client of OpenAI, and takes long to import.
@pytest.mark.nightly
def test_langchain(server, model):
    package = pytest.importorskip("langchain_openai")
    where = {"model": NAME, "base_url": f"{server.url}/v1", "api_key": "none"}
    chat = package.ChatOpenAI(**where, max_retries=0, **OPTIONS)
    expected = model.generate(USER, **OPTIONS).text
    assert chat.invoke("Hello.").content == expected
    assert "".join(chunk.content for chunk in chat.stream("Hello.")) == expected
