"""`treeflash launch` with an agent of the tests, which tells what it was given and asks once."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import tomllib
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from failures import failing
from processes import hide_frameworks
from servers import NAME, PATIENCE
from stand_ins import stand_in
from tool_models import CHAT_TEMPLATE, tool_tokenizer

from treeflash.commands import launch, serve
from treeflash.serving.agents import AGENTS, KEY_VARIABLE, PATIENCE_MS, Endpoint

AGENT = f"""#!{sys.executable}
import json, os, sys, urllib.request

told = dict(argv=sys.argv[1:], environment=dict(os.environ))
if "--ask" in sys.argv:
    url = os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages"
    body = dict(model=os.environ["ANTHROPIC_MODEL"], max_tokens=4)
    body["messages"] = [dict(role="user", content="Hi")]
    headers = {{"Authorization": "Bearer " + os.environ["ANTHROPIC_AUTH_TOKEN"]}}
    headers["Content-Type"] = "application/json"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    told["answer"] = json.load(urllib.request.urlopen(request))
print(json.dumps(told), flush=True)
if "--wait" in sys.argv:
    sys.stdin.read()
sys.exit(7)
"""


@pytest.fixture(autouse=True)
def agents(tmp_path, monkeypatch):
    """All agents are installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for agent in AGENTS.values():
        (folder / agent.command).write_text(AGENT)
        (folder / agent.command).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    hide_frameworks(folder)  # from the command and the server that it starts
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of the user")
    return folder


@pytest.fixture
def run(capfd):
    """Run the command: exit status, what the agent told, standard error."""

    def run(*args: object):
        code = launch.main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return code, json.loads(out) if out else None, err

    return run


def refusal(ended):
    """The one line of an error; no agent was started."""
    code, told, err = ended
    assert (code, told, err.count("\n")) == (2, None, 1), err
    return err


def port_of(server):
    return int(server.url.rpartition(":")[2])


def learned(name, told):
    """What an agent was told, in the agent's own way: address, key, model, context length."""
    environment = told["environment"]
    if name == "claude":
        assert "ANTHROPIC_API_KEY" not in environment
        names = ("ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_MODEL")
        window = int(environment["CLAUDE_CODE_AUTO_COMPACT_WINDOW"])
        return *(environment[x] for x in names), window
    if name == "codex":
        flags, values = told["argv"][:-1:2], told["argv"][1::2]
        assert set(flags) == {"-c"}
        config = tomllib.loads("\n".join(values))
        provider = config["model_providers"][config["model_provider"]]
        url = provider["base_url"].removesuffix("/v1")
        key = environment[provider["env_key"]]
        return url, key, config["model"], config["model_context_window"]
    config = json.loads(environment["OPENCODE_CONFIG_CONTENT"])
    ((provider, settings),) = config["provider"].items()
    ((model, description),) = settings["models"].items()
    assert config["model"] == config["small_model"] == f"{provider}/{model}"
    options = settings["options"]
    url = options["baseURL"].removesuffix("/v1")
    return url, options["apiKey"], model, description["limit"]["context"]


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_learns_of_a_running_server(run, server, name):
    code, told, err = run(name, "--port", port_of(server), "--", "last")
    assert code == 7, err
    assert told["argv"][-1] == "last"
    context = server.engine.model.backend.max_positions
    assert learned(name, told) == (server.url, "-", NAME, context)
    assert "127.0.0.1" in told["environment"]["NO_PROXY"]
    assert f"using the server at {server.url} with {NAME}" in err
    assert server.client.get("/health").status_code == 200, "it was there before"


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_gets_the_key(run, serve, tmp_path, name):
    server = serve(api_keys=("first", "second"))
    keys = tmp_path / "keys"
    keys.write_text("first\n")
    where = ("--port", port_of(server), "--model-name", NAME.upper())
    code, told, err = run(name, *where, "--api-key-file", keys, "--", "last")
    assert code == 7, err
    assert learned(name, told)[1:3] == ("first", NAME), "names have no case"
    assert "--api-key-file" in refusal(run(name, "--port", port_of(server)))


def test_the_user_may_have_a_proxy(run, server, monkeypatch):
    """Neither the command's own request nor the agent's goes there."""
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    code, told, err = run("claude", "--port", port_of(server), "--", "--ask")
    assert (code, told["answer"]["type"]) == (7, "message"), err
    assert told["environment"]["NO_PROXY"] == "example.org,127.0.0.1"


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_that_is_not_installed(run, agents, monkeypatch, name):
    monkeypatch.setenv("PATH", str(agents.parent))
    err = refusal(run(name))
    assert f"{AGENTS[name].name} is not installed" in err
    assert AGENTS[name].install in err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "required: agent"),
        (["--", "claude"], "required: agent"),
        (["emacs"], "invalid choice: 'emacs'"),
        (["--port", "1", "claude"], "write the agent first"),
        (["claude", "-p", "Hi"], "unrecognized arguments: -p Hi"),
        (["claude", "--temperature", "-1", "--port", "0"], "temperature"),
        (["claude", "--target", "/no/such/folder", "--port", "0"], "/no/such/folder"),
        (["claude", "--host", "no.such.host.invalid", "--port", "1"], "another --host"),
        (["claude", "--host", "no.such.host.invalid", "--port", "0"], "another --host"),
    ],
)
def test_bad_options(run, args, says):
    assert says in refusal(run(*args))


def test_another_model_than_the_server_has(run, server):
    err = refusal(run("claude", "--port", port_of(server), "--model-name", "large"))
    assert f"has {NAME} and not large" in err


@contextmanager
def answering(status, body):
    """Run another program's server, which answers every request so; returns its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            yield other.server_port
        finally:
            other.shutdown()
            thread.join()


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"nothing"),
        (200, b"<html>"),
        (200, b"[]"),
        (200, b'{"data": []}'),
        (200, b'{"data": [{"id": "other", "owned_by": "vllm", "max_model_len": 8}]}'),
    ],
)
def test_a_port_that_another_program_has(run, status, body):
    with answering(status, body) as port:
        err = refusal(run("claude", "--port", port))
    assert "is taken by another program; choose another --port" in err


@pytest.mark.parametrize("context", [4096, 65536, 262144])
def test_limits(context):
    """Answers leave room for the prompt, and Claude Code compacts before the context is full."""
    endpoint = Endpoint("http://127.0.0.1:8000", "-", "tiny", context)
    assert 0 < endpoint.output <= context // 4
    claude = AGENTS["claude"].environment(endpoint)
    window = max(int(claude["CLAUDE_CODE_AUTO_COMPACT_WINDOW"]), 100_000)
    percent = int(claude.get("CLAUDE_AUTOCOMPACT_PCT_OVERRIDE", "90"))
    assert percent * window / 100 < context
    assert KEY_VARIABLE in AGENTS["codex"].environment(endpoint)
    patience = f"model_providers.treeflash.stream_idle_timeout_ms={PATIENCE_MS}"
    assert patience in AGENTS["codex"].arguments(endpoint)
    assert claude["CLAUDE_STREAM_IDLE_TIMEOUT_MS"] == str(PATIENCE_MS)


@pytest.fixture(scope="session")
def model(tool_pair):
    """The pair of the other tests, with a tokenizer whose templates know tools."""
    return tool_pair


def command(model, *args):
    """Start the command with its own server, in its own session."""
    pair = ["--target", model.folder, "--drafter", model.folder.parent / "drafter"]
    options = [*pair, "--backend", "reference", "--port", "0", "--model-name", NAME]
    return subprocess.Popen(
        [sys.executable, "-m", "treeflash", "launch", "claude", *options, "--", *args],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def check_gone(url):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), PATIENCE)


def test_a_server_lives_as_long_as_the_agent(model):
    with command(model, "--ask", "--wait") as process:
        told = json.loads(process.stdout.readline())
        url, *rest = learned("claude", told)
        assert rest == ["-", NAME, model.backend.max_positions]
        assert told["answer"]["usage"]["output_tokens"] > 0
        with urllib.request.urlopen(f"{url}/health") as response:
            assert response.status == 200
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 7
    assert f"serving {NAME} at {url}" in err
    assert not Path(err.rpartition(" log in ")[2].strip()).exists(), "the log was temporary"
    check_gone(url)


# Another server in a process; `test_a_server_lives_as_long_as_the_agent` has its end.
@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_agent_and_server(model, number):
    """Ctrl-C reaches all processes of a terminal, SIGTERM only the command."""
    with command(model, "--wait") as process:
        url, *_ = learned("claude", json.loads(process.stdout.readline()))
        send = os.killpg if number == signal.SIGINT else os.kill
        send(process.pid, number)
        # The agent has the other end of the pipe: at its end, the agent has ended too.
        process.stdout.read()
        assert process.wait(PATIENCE) == 128 + number
    check_gone(url)


@pytest.mark.parametrize(
    ("response", "chat", "reason"),
    [
        (None, "{{ messages }}", "target cannot call tools, which agents need; choose --target"),
        (None, CHAT_TEMPLATE, "the form in which target calls tools, which agents need, is not"),
    ],
)
def test_a_target_that_cannot_call_tools_is_refused_before_it_is_loaded(
    run, model, tmp_path, response, chat, reason
):
    target = tmp_path / "target"
    shutil.copytree(model.folder, target)
    (target / "model.safetensors").unlink()  # loading it would fail
    tool_tokenizer(target, response, chat)
    options = ["--target", target, "--backend", "reference", "--port", "0", "--method", "ar"]
    assert reason in refusal(run("claude", *options))


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("exit 1", "the server ended with status 1: it printed nothing"),
        ("echo 'error: model.safetensors is damaged'; exit 2", "model.safetensors is damaged"),
    ],
)
def test_a_server_that_ends_before_it_is_ready(run, model, agents, monkeypatch, program, says):
    """Its own line is shown, and the agent is not started."""
    server = agents / "python"
    server.write_text(f"#!/bin/sh\n{program}\n")
    server.chmod(0o755)
    stand_in(monkeypatch, sys, executable=str(server))
    code, told, err = run("claude", "--port", "0", "--target", model.folder, "--method", "ar")
    assert (code, told) == (2, None)
    assert f"error: {says}\n" in err


def test_an_interruption_ends_a_server_that_still_answers():
    program = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)"
    command = [sys.executable, "-c", f"{program}; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with failing(process, "wait", KeyboardInterrupt, call=1):
            launch.end_server(process)
    assert process.returncode == -signal.SIGKILL


def test_the_options_are_those_of_serve():
    """Every option of `serve` is one of `launch`."""

    def flags(parser):
        return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", parser.format_help(), re.MULTILINE))

    assert flags(launch.make_parser()) == flags(serve.make_parser()) > {"--target", "--port"}
