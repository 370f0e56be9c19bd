"""An application that speaks to Ollama alone: the command `llm` with the plugin `llm-ollama`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from servers import NAME, serving
from tool_models import COLOUR, tool_model

pytest.importorskip("llm_ollama")
pytestmark = pytest.mark.nightly

MODEL = f"ollama/{NAME}"
SHORT = ("-o", "num_predict", "12")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tool_model(tmp_path_factory.mktemp("tools")), {"max_tokens": 64}) as running:
        yield running


@pytest.fixture
def llm(server, tmp_path):
    """Run the command, which knows the server's address alone; returns what it prints."""

    def llm(*args):
        environment = {"OLLAMA_HOST": server.url, "LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-m", "llm", *args], env={**os.environ, **environment},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip("\n")

    return llm


@pytest.fixture
def expected(server):
    """The server's answer to messages, without reasoning."""

    def expected(*messages):
        asked = [dict(zip(("role", "content"), message, strict=True)) for message in messages]
        body = {"messages": asked, "max_tokens": 12, "reasoning_effort": "none"}
        answer = server.post("/v1/chat/completions", body).json()
        return answer["choices"][0]["message"]["content"].rstrip("\n")

    return expected


def test_the_model_is_found_with_what_it_can_do(llm):
    assert re.search(rf"{NAME} .*completion, thinking, tools", llm("ollama", "models"))
    assert f"Ollama: {MODEL}" in llm("models")


@pytest.mark.parametrize("stream", [(), ("--no-stream",)], ids=["stream", "whole"])
def test_a_prompt_and_the_next_one(llm, expected, stream):
    options = (*SHORT, "-o", "think", "false", *stream)
    first = llm("-m", MODEL, *options, "Hello.")
    user = ("user", "Hello.")
    assert first == expected(user)
    second = llm("--continue", *options, "And now?")
    assert second == expected(user, ("assistant", first), ("user", "And now?"))


def test_thinking_is_told_apart(llm):
    assert llm("-m", MODEL, *SHORT, "-o", "think", "true", "Hello.", "--hide-reasoning") == ""


def test_a_schema_is_obeyed(llm):
    answer = llm("-m", MODEL, "--schema", json.dumps(COLOUR), "-o", "think", "false", "A colour?")
    assert json.loads(answer)["colour"] in ("red", "blue")
