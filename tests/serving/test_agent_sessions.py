"""An agent's session: every turn runs the prompt tokens that are new, and hardly any others.

The client sends the whole conversation with each turn. What is new is the part behind the longest
beginning that any earlier prompt had, so the tests compare the prompts of the server with the
cached tokens that it reports. The text of the recorded assistant is not the tiny model's own.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
from byte_tokens import SPECIAL
from recordings import recording
from rich.console import Console
from scripted_model import reference_model
from servers import serving
from tool_models import tool_tokenizer

from treeflash.commands.chat import ChatSession
from treeflash.config import GIB, LoadConfig
from treeflash.decoding import SchedulerConfig
from treeflash.decoding.disk_cache import BLOCK
from treeflash.testing import require
from treeflash.testing.models import write_drafter, write_target

pytestmark = pytest.mark.sample(1)

# Reasoning is kept after the last message of the user only, as in Qwen3's template.
CHAT_TEMPLATE = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|start|>tools: {{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}: "
    "{% if m.reasoning_content and loop.index0 > ns.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>"
    "{% endfor %}<|end|>{% endfor %}<|start|>assistant: "
    "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
)
APIS = ("messages", "responses")
FAMILIES = ("llama", "qwen3_5")  # the second has recurrent layers
TOOLS = ("read_file", "edit_file", "run_command")


@pytest.fixture(scope="module", params=FAMILIES)
def agent_pair(request, tmp_path_factory):
    """The folders of a tiny target and its drafter."""
    folder = tmp_path_factory.mktemp(request.param)
    target, drafter = folder / "target", folder / "drafter"
    write_target(
        target, request.param, seed=3, vocab_size=len(SPECIAL) + 256, max_positions=1 << 16
    )
    tool_tokenizer(target, chat_template=CHAT_TEMPLATE)
    write_drafter(drafter, target, seed=4)
    return target, drafter


@pytest.fixture(scope="module")
def agent_model(agent_pair):
    return reference_model(*agent_pair)


@pytest.fixture
def api(agent_model):
    """The sessions of a model; sessions of full size have each API with each model."""
    return APIS[agent_model.backend.open(1, drafts=False).needs_snapshots]


@pytest.fixture(scope="module")
def fast_model(agent_pair):
    """The pair in PyTorch: in NumPy the attention to 60,000 positions would take half an hour."""
    require("torch")
    from treeflash_cuda.backend import load

    pair = load(*agent_pair, LoadConfig(device="cpu", dtype="float32"))
    return replace(reference_model(*agent_pair), backend=pair)


@dataclass(frozen=True)
class Size:
    """A session: characters of the system message and of a tool's result, and its turns."""

    system: int
    result: int
    turns: int


SMALL = Size(700, 100, 6)
SHORT_INTERVAL = 512
"""Tokens between the states that recurrent layers keep of a small session."""
FULL = Size(14_500, 1550, 40)
"""An agent's day: 15,000 tokens of instructions and tools, and 60,000 at its end."""


def text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("abcdefghij \n", k=length))


class Session:
    """A conversation as a client keeps it: messages of the user, answers with calls, and results.

    Every third answer has no call, and a message of the user follows.
    """

    def __init__(self, name: str, size: Size = SMALL) -> None:
        self.rng, self.size = random.Random(name), size
        self.system = text(random.Random("system"), size.system) + name
        self.messages: list[dict] = []
        self.turn = 0
        self.cached: int | None = None  # prompt tokens of the last turn that were cached
        self.ask()

    def ask(self) -> None:
        self.messages.append({"role": "user", "text": text(self.rng, 120)})

    def go_on(self) -> None:
        """Add the answer of a turn, and what follows it."""
        self.turn += 1
        answer = {"role": "assistant", "reasoning": text(self.rng, 60), "text": text(self.rng, 30)}
        self.messages.append(answer)
        if self.turn % 3 == 0:
            self.ask()
            return
        call = {"id": f"call_{self.turn}", "name": TOOLS[self.turn % 3], "path": f"{self.turn}.py"}
        answer["call"] = call
        result = text(self.rng, self.size.result)
        self.messages.append({"role": "tool", "id": call["id"], "text": result})

    def compact(self) -> None:
        """Replace the conversation by a summary of it."""
        self.messages = []
        self.ask()

    def body(self, api: str) -> tuple[str, dict]:
        """The request of the next turn."""
        if api == "messages":
            tools = [{"name": name, "input_schema": SCHEMA} for name in TOOLS]
            body = {"system": self.system, "messages": list(map(anthropic_message, self.messages))}
            return "/v1/messages", {**body, "tools": tools, "max_tokens": 4}
        tools = [{"type": "function", "name": name, "parameters": SCHEMA} for name in TOOLS]
        items = [item for message in self.messages for item in response_items(message)]
        body = {"instructions": self.system, "input": items, "tools": tools}
        return "/v1/responses", {**body, "max_output_tokens": 4}


def anthropic_message(m: dict) -> dict:
    if m["role"] == "tool":
        result = {"type": "tool_result", "tool_use_id": m["id"], "content": m["text"]}
        return {"role": "user", "content": [result]}
    content = [{"type": "text", "text": m["text"]}]
    if m["role"] == "assistant":
        content.insert(0, {"type": "thinking", "thinking": m["reasoning"], "signature": ""})
    if "call" in m:
        call = {**m["call"], "input": {"path": m["call"]["path"]}}
        content.append({"type": "tool_use", **{x: call[x] for x in ("id", "name", "input")}})
    return {"role": m["role"], "content": content}


def response_items(m: dict) -> Iterator[dict]:
    if m["role"] == "tool":
        yield {"type": "function_call_output", "call_id": m["id"], "output": m["text"]}
        return
    if m["role"] == "assistant":
        content = [{"type": "reasoning_text", "text": m["reasoning"]}]
        yield {"type": "reasoning", "summary": [], "content": content}
    yield {"type": "message", "role": m["role"], "content": m["text"]}
    if "call" in m:
        arguments = json.dumps({"path": m["call"]["path"]})
        called = {"call_id": m["call"]["id"], "name": m["call"]["name"], "arguments": arguments}
        yield {"type": "function_call", **called}


SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}


def shared(one, other):
    """The number of tokens with which both prompts begin."""
    n = min(len(one), len(other))
    different = np.flatnonzero(np.array(one[:n]) != np.array(other[:n]))
    return int(different[0]) if len(different) else n


class Client:
    """Sends turns, and compares what was cached with what earlier prompts had."""

    def __init__(self, api: str) -> None:
        self.api = api
        self.prompts: list[tuple[int, ...]] = []
        self.server = None

    @contextmanager
    def connected(self, model, interval=SHORT_INTERVAL, **settings):
        with serving(model, **settings) as self.server:
            scheduler = self.server.engine.scheduler
            scheduler.config = replace(scheduler.config, snapshot_interval=interval)
            yield self

    def send(self, session: Session, *, lost: int = 1) -> tuple[int, int]:
        """Send a turn; returns the number of cached tokens, and how many came from the disk.

        At most `lost` tokens that an earlier prompt began with are run again; the last token of a
        prompt always is.
        """
        path, body = session.body(self.api)
        with recording(self.server.engine, "submit") as submitted:
            response = self.server.post(path, body)
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        (((answer,),),) = submitted
        prompt = answer.prompt_ids
        self.prompts.append(prompt)
        if self.api == "messages":
            cached = usage["cache_read_input_tokens"]
            disk = usage.get("disk_cache_read_input_tokens", 0)
            assert usage["input_tokens"] + cached == len(prompt)
        else:
            cached = usage["input_tokens_details"]["cached_tokens"]
            disk = usage["input_tokens_details"].get("disk_cached_tokens", 0)
            assert usage["input_tokens"] == len(prompt)
        known = max((shared(prompt, other) for other in self.prompts[:-1]), default=0)
        assert known - lost <= cached < len(prompt), (known, len(prompt))
        session.cached = cached
        return cached, disk


def replay(client, session, turns):
    """Send the next turns of a session, whose cached tokens grow every time."""
    for _ in range(turns):
        if (before := session.cached) is not None:
            session.go_on()
        cached, disk = client.send(session)
        # Where reasoning is dropped, what stands behind it has to be run again.
        assert before is None or cached > before or session.messages[-1]["role"] == "user"
        assert disk == 0


def test_each_turn_runs_what_is_new(agent_model, api):
    client = Client(api)
    with client.connected(agent_model):
        replay(client, Session("main"), SMALL.turns)


@pytest.mark.nightly
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("api", APIS)
def test_a_session_of_full_size(fast_model, api, tmp_path):
    """Two sub-agents take turns with it, the server is started again, and it is compacted."""
    client, main = Client(api), Session("main", FULL)
    helpers = [Session(name, FULL) for name in ("one", "two")]
    interval = SchedulerConfig().snapshot_interval
    settings = {"timeout": 3600, "max_memory_gb": 16, "prefix_cache_dir": str(tmp_path)}
    settings["interval"] = interval
    recurrent = fast_model.backend.open(1, drafts=False).needs_snapshots
    lost = interval if recurrent else 1
    with client.connected(fast_model, **settings):
        replay(client, main, FULL.turns // 4)
        for helper in helpers:
            client.send(helper, lost=lost)
        for _ in range(4):
            for session in (*helpers, main):
                replay(client, session, 1)
        replay(client, main, FULL.turns // 2 - main.turn)
    with client.connected(fast_model, **settings):
        main.go_on()
        cached, disk = client.send(main, lost=1 if recurrent else BLOCK)
        assert cached == disk > FULL.system
        replay(client, main, FULL.turns - main.turn)
        assert len(client.prompts[-1]) >= 60_000
        main.compact()
        cached, _ = client.send(main, lost=lost)
        assert cached > FULL.system - lost


def test_sub_agents_take_turns(agent_model):
    client = Client("messages")
    sessions = [Session(name) for name in ("main", "one", "two")]
    with client.connected(agent_model):
        for session in sessions:
            # The system messages differ at their end, where recurrent layers have no state.
            client.send(session, lost=SHORT_INTERVAL)
        for _ in range(3):
            for session in sessions:
                session.go_on()
                client.send(session)


def test_a_compacted_conversation_keeps_the_instructions(agent_model):
    client, session = Client("messages"), Session("main")
    recurrent = agent_model.backend.open(1, drafts=False).needs_snapshots
    with client.connected(agent_model):
        replay(client, session, 4)
        session.compact()
        cached, _ = client.send(session, lost=SHORT_INTERVAL if recurrent else 1)
        assert cached >= SHORT_INTERVAL
        session.go_on()
        client.send(session)


@pytest.mark.usefixtures("own_cache")
def test_a_session_goes_on_after_a_restart(agent_model, api, tmp_path):
    client, session = Client(api), Session("main")
    settings = {"prefix_cache_dir": str(tmp_path)}
    recurrent = agent_model.backend.open(1, drafts=False).needs_snapshots
    with client.connected(agent_model, **settings):
        replay(client, session, 4)
    for _ in range(2):
        with client.connected(agent_model, **settings):
            session.go_on()
            # Blocks are whole; states of recurrent layers are stored where a prompt ended.
            cached, disk = client.send(session, lost=1 if recurrent else BLOCK)
            assert cached == disk > SHORT_INTERVAL
            metrics = client.server.client.get("/metrics").text
            counted = 'treeflash:external_prefix_cache_hits_total{model="tiny"}'
            assert f"{counted} {float(disk)}" in metrics
            session.go_on()
            assert client.send(session)[1] == 0


@pytest.mark.usefixtures("own_cache")
def test_a_conversation_in_the_terminal_goes_on(model, tmp_path):
    answers = []
    for restored in (False, True):
        disk = model.disk_cache(tmp_path, GIB)
        console = Console(file=io.StringIO())
        talked = ChatSession(model, {"max_tokens": 8, "seed": 1}, console, disk=disk)
        talked.reply("A long question. " * 20)
        talked.close()
        first = talked.answer.chunks[0].step
        assert (first.disk_tokens >= 256) == restored
        answers.append(talked.messages[-1]["content"])
    assert answers[0] == answers[1]
