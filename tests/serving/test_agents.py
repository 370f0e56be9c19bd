"""Codex and Claude Code: the npm packages themselves, and requests as they send them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest
from recordings import recording
from scripted_model import reference_model, scripted_model
from servers import serving, serving_pool

from treeflash.serving.models import ModelPool, ModelSpec
from treeflash.serving.response_templates import QWEN
from treeflash.serving.settings import Settings

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
LAUNCH_DOCS = DOCS.with_name("agents.md")
PACKAGES = {
    "codex": "@openai/codex",
    "claude": "@anthropic-ai/claude-code",
    "opencode": "opencode-ai",
}
MAKE, BYPASS = "echo made > made.txt", "--dangerously-bypass-approvals-and-sandbox"
CALLS = {
    "codex": ("exec_command", {"cmd": MAKE}),
    "claude": ("Bash", {"command": MAKE, "description": "Make a file"}),
    "opencode": ("bash", {"command": MAKE, "description": "Make a file"}),
}
"""How each agent names and calls its tool that runs commands."""
CHAT_TEMPLATE = (
    "{{ tools | tojson if tools }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
    "{% endfor %}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% if messages | selectattr('role', 'equalto', 'tool') | list %}<|done|>"
    "{% elif tools and 'a file' in users | map(attribute='content') | join %}<|call|>"
    "{% else %}<|hello|>{% endif %}"
)


def agent_model(folder, name, arguments):
    """A pair that says hello, or calls a function if it is asked for a file, and then says so."""
    call = ["<tool_call>", f'{{"name": "{name}", ', f'"arguments": {json.dumps(arguments)}}}']
    answers = {
        "<|hello|>": ["Hel", "lo", "!"],
        "<|call|>": [*call, "</tool_call>"],
        "<|done|>": ["It", " is", " done."],
    }
    return scripted_model(folder, answers, CHAT_TEMPLATE, {**QWEN, "start_anchor": list(answers)})


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The folder of the commands."""
    if (npm := shutil.which("npm")) is None:
        pytest.skip("npm is missing")
    folder = tmp_path_factory.mktemp("npm")
    (folder / "package.json").write_text("{}")
    subprocess.run([npm, "install", *PACKAGES.values()], cwd=folder, check=True)
    modules = folder / "node_modules"
    # npm may not run the scripts of packages unasked.
    for agent, script in {"claude": "install.cjs", "opencode": "postinstall.mjs"}.items():
        subprocess.run(["node", script], cwd=modules / PACKAGES[agent], check=True)
    return modules / ".bin"


def documented(part, server, name):
    """The block of the documentation that has this part, with a server's address and a model."""
    blocks = re.findall(r"```\w+\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if part in block]
    return block.replace("http://127.0.0.1:8000", server.url).replace("NAME", name)


def run_agent(packages, folder, command, codex_config):
    """Run a documented command in its own folder and home, without a network."""
    home, work = folder / "home", folder / "work"
    (home / ".codex").mkdir(parents=True)
    work.mkdir()
    (home / ".codex" / "config.toml").write_text(codex_config)
    nowhere = "http://127.0.0.1:9"
    environment = {
        "HOME": str(home),
        "PATH": f"{packages}:{os.environ['PATH']}",
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), nowhere),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1"),
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=work, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, work


# npm installs the packages. The tests without them send requests that they sent.
@pytest.mark.nightly
@pytest.mark.parametrize("task", ["Say hello.", "Make a file."])
@pytest.mark.parametrize("agent", ["codex", "claude"])
def test_agents(packages, tmp_path, agent, task):
    """The client shows the answer, or runs the command that the model calls for."""
    with serving(agent_model(tmp_path / "model", *CALLS[agent])) as server:
        if agent == "codex":
            command = f"codex exec --skip-git-repo-check {BYPASS} '{task}'"
        else:
            command = documented("ANTHROPIC_BASE_URL", server, "tiny").strip()
            assert command.endswith("\nclaude")
            command += f" -p '{task}' --allowedTools Bash"
        config = documented("# Codex: ~/.codex/config.toml", server, "tiny")
        output, work = run_agent(packages, tmp_path, command, config)
    if "hello" in task:
        assert output.strip().endswith("Hello!")
        assert not (work / "made.txt").exists()
    else:
        assert output.strip().endswith("It is done.")
        assert (work / "made.txt").read_text() == "made\n"


@pytest.mark.nightly
@pytest.mark.parametrize("agent", PACKAGES)
def test_launched_agents(packages, tmp_path, agent):
    """The documented command makes the file, and does not touch the user's configuration."""
    start = f"treeflash launch {agent} --target Qwen/Qwen3-8B"
    lines = LAUNCH_DOCS.read_text().split("\n")
    (command,) = [line for line in lines if line.startswith(f"{start} -- ")]
    agent_model(tmp_path / "model", *CALLS[agent])
    pair = f"--target {tmp_path}/model/target --drafter {tmp_path}/model/drafter"
    options = f"{pair} --backend reference --port 0"
    command = command.replace(start, f"treeflash launch {agent} {options}")
    command = f"{sys.executable} -m {command}"
    if agent == "codex":  # its sandbox needs what a container may lack
        command = command.replace("--skip-git-repo-check", f"--skip-git-repo-check {BYPASS}")
    config = 'model = "of the user"\n'
    output, work = run_agent(packages, tmp_path, command, config)
    assert output.strip().endswith("It is done.")
    assert (work / "made.txt").read_text() == "made\n"
    assert (tmp_path / "home" / ".codex" / "config.toml").read_text() == config


@pytest.mark.nightly
@pytest.mark.parametrize("choice", ["codex exec -m NAME", "launch"])
def test_codex_chooses_between_models(packages, tmp_path, choice):
    """Each of two models calls the tool in its own way, and only the chosen one is loaded."""
    limits, specs = Settings(), []
    for name in ("first", "second"):
        agent_model(tmp_path / name, "exec_command", {"cmd": f"echo {name} > made.txt"})
        target, drafter = tmp_path / name / "target", tmp_path / name / "drafter"
        load = partial(reference_model, target, drafter)
        specs.append(
            ModelSpec(names=(name,), load=load, settings=limits, defaults={}, folder=target)
        )
    options = f"--skip-git-repo-check {BYPASS} 'Make a file.'"
    pool = ModelPool(specs, limits)
    with serving_pool(pool) as server:
        config = documented("# Codex: ~/.codex/config.toml", server, "first")
        command = f"{choice.replace('NAME', 'second')} {options}"
        if choice == "launch":
            named = f"--model-name second --port {httpx.URL(server.url).port}"
            command = f"{sys.executable} -m treeflash launch codex {named} -- exec {options}"
        output, work = run_agent(packages, tmp_path, command, config)
        assert [model.service is not None for model in pool.models] == [False, True]
    assert output.strip().endswith("It is done.")
    assert (work / "made.txt").read_text() == "second\n"


def function(name, **properties):
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"type": "function", "name": name, "strict": False, "parameters": schema}


def item(role, text):
    content = [{"type": "input_text", "text": text}]
    return {"type": "message", "id": f"msg_{role}", "role": role, "content": content}


NAMESPACE = {
    "type": "namespace",
    "name": "multi_agent_v1",
    "description": "Tools for spawning and managing sub-agents.",
    "tools": [function("close_agent", target={"type": "string"})],
}
SEARCH = {"type": "web_search", "external_web_access": False}
CODEX = {
    "model": "tiny",
    "instructions": "You are a coding agent.",
    "input": [item("developer", "<permissions>"), item("user", "Make a file.")],
    "tools": [function("exec_command", cmd={"type": "string"}), NAMESPACE, SEARCH],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "none", "summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "01a21f0b",
    "client_metadata": {"session": "01a21f0b"},
}
KEPT = {"cache_control": {"type": "ephemeral"}}
SCHEMA = {"type": "object"}
CLAUDE = {
    "model": "tiny",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Make a file.", **KEPT}]},
        {"role": "system", "content": "Available agent types for the Agent tool: ..."},
    ],
    "system": [{"type": "text", "text": "You are an agent.", **KEPT}],
    "tools": [{"name": "Bash", "description": "Run.", "input_schema": SCHEMA, **KEPT}],
    "metadata": {"user_id": "{}"},
    "max_tokens": 32000,
    "temperature": 1,
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
}


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """A server whose model calls a function of a namespace."""
    folder = tmp_path_factory.mktemp("caller") / "model"
    with serving(agent_model(folder, "multi_agent_v1.close_agent", {"target": "7"})) as running:
        yield running


def test_functions_of_a_namespace(caller, caplog):
    """They reach the model as NAMESPACE.FUNCTION, and the client as it named them."""
    with caplog.at_level("INFO", "treeflash.serving"):
        response = caller.post("/v1/responses", CODEX)
    assert response.status_code == 200, response.text
    (call,) = response.json()["output"]
    expected = {"type": "function_call", "namespace": "multi_agent_v1", "name": "close_agent"}
    assert call.items() >= expected.items()
    assert json.loads(call["arguments"]) == {"target": "7"}
    assert "web_search is ignored" in caplog.text
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Closed."}
    history = {**CODEX, "input": [*CODEX["input"], call, result]}
    (item,) = caller.post("/v1/responses", history).json()["output"]
    assert item["content"][0]["text"] == "It is done."


def test_the_model_reads_calls_and_tools_with_the_namespace(caller):
    call = {"type": "function_call", "call_id": "call_1", "arguments": "{}"}
    call |= {"name": "close_agent", "namespace": "multi_agent_v1"}
    with recording(caller.engine.model.tokenizer, "render") as seen:
        caller.post("/v1/responses", {**CODEX, "input": [*CODEX["input"], call]})
    ((messages, variables),) = seen
    names = [tool["function"]["name"] for tool in variables["tools"]]
    assert names == ["exec_command", "multi_agent_v1.close_agent"]
    assert messages[-1]["tool_calls"][0]["function"]["name"] == "multi_agent_v1.close_agent"


@pytest.mark.parametrize(
    ("path", "body", "ends"),
    [
        ("/v1/responses", CODEX, '"type":"response.completed"'),
        ("/v1/messages?beta=true", CLAUDE, '"stop_reason":"tool_use"'),
    ],
)
def test_agents_as_they_ask(caller, path, body, ends):
    assert caller.client.head("/").status_code == 200  # Claude Code sends it first
    for stream in (False, True):
        response = caller.post(path, {**body, "stream": stream})
        assert response.status_code == 200, response.text
    assert ends in response.text
