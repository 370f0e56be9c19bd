"""An agent's session: every turn runs the prompt tokens that are new, and hardly any others.

The client sends the whole conversation with each turn. What is new is the part behind the longest
beginning that any earlier prompt had, so the tests compare the prompts of the server with the
cached tokens that it reports. The text of the recorded assistant is not the tiny model's own.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from byte_tokens import byte_pair
from recordings import recording
from scripted_model import reference_model
from servers import serving
from tool_models import tool_tokenizer

from treeflash.config import LoadConfig
from treeflash.decoding import SchedulerConfig
from treeflash.decoding.disk_cache import BLOCK_POSITIONS
from treeflash.testing import require

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
FAMILIES = ("llama", "qwen3_5")  # the second has recurrent layers
TOOLS = ("read_file", "edit_file", "run_command")


@pytest.fixture(scope="module", params=FAMILIES)
def agent_pair(request, tmp_path_factory):
    """The folders of a tiny target and its drafter."""
    folder = tmp_path_factory.mktemp(request.param)
    target, drafter = byte_pair(folder, request.param, max_positions=1 << 16)
    tool_tokenizer(target, chat_template=CHAT_TEMPLATE)
    return target, drafter


@pytest.fixture(scope="module")
def agent_model(agent_pair):
    return reference_model(*agent_pair)


@pytest.fixture(scope="module")
def fast_model(agent_pair):
    """The pair in PyTorch: in NumPy the attention to 60,000 positions would take half an hour."""
    require("torch")
    from treeflash_cuda.backend import load

    pair = load(*agent_pair, LoadConfig(device="cpu", dtype="float32"))
    return replace(reference_model(*agent_pair), backend=pair)


class Size(NamedTuple):
    """A session: characters of the system message and of a tool's result."""

    system: int
    result: int


SMALL = Size(700, 100)
SHORT_INTERVAL = 512
"""Tokens between the states that recurrent layers keep of a small session."""
FULL, TURNS = Size(14_500, 1550), 40
"""An agent's day: 15,000 tokens of instructions and tools, and 60,000 at its end."""


def text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("abcdefghij \n", k=length))


SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}


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
        self.say()

    def say(self) -> None:
        content = [{"type": "text", "text": text(self.rng, 120)}]
        self.messages.append({"role": "user", "content": content})

    @property
    def said(self) -> bool:
        """Whether the last message is the user's own."""
        return self.messages[-1]["content"][0]["type"] == "text"

    def go_on(self) -> None:
        """Add the answer of a turn, and what follows it."""
        self.turn += 1
        thought = {"type": "thinking", "thinking": text(self.rng, 60), "signature": ""}
        content = [thought, {"type": "text", "text": text(self.rng, 30)}]
        self.messages.append({"role": "assistant", "content": content})
        if self.turn % 3 == 0:
            self.say()
            return
        call = {"type": "tool_use", "id": f"call_{self.turn}", "name": TOOLS[self.turn % 3]}
        content.append(call | {"input": {"path": f"{self.turn}.py"}})
        result = {"type": "tool_result", "tool_use_id": call["id"]}
        result["content"] = text(self.rng, self.size.result)
        self.messages.append({"role": "user", "content": [result]})

    def compact(self) -> None:
        """Replace the conversation by a summary of it."""
        self.messages = []
        self.say()

    def body(self) -> dict:
        """The request of the next turn."""
        tools = [{"name": name, "input_schema": SCHEMA} for name in TOOLS]
        body = {"system": self.system, "messages": self.messages}
        return {**body, "tools": tools, "max_tokens": 4}


def shared(one, other):
    """The number of tokens with which both prompts begin."""
    n = min(len(one), len(other))
    different = np.flatnonzero(np.array(one[:n]) != np.array(other[:n]))
    return int(different[0]) if len(different) else n


class Client:
    """Sends turns, and compares what was cached with what earlier prompts had."""

    def __init__(self) -> None:
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
        with recording(self.server.engine, "submit") as submitted:
            response = self.server.post("/v1/messages", session.body())
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        (((answer,),),) = submitted
        prompt = answer.prompt_ids
        self.prompts.append(prompt)
        cached = usage["cache_read_input_tokens"]
        assert usage["input_tokens"] + cached == len(prompt)
        known = max((shared(prompt, other) for other in self.prompts[:-1]), default=0)
        assert known - lost <= cached < len(prompt), (known, len(prompt))
        session.cached = cached
        return cached, usage.get("disk_cache_read_input_tokens", 0)


def replay(client, session, turns):
    """Send the next turns of a session, whose cached tokens grow every time."""
    for _ in range(turns):
        if (before := session.cached) is not None:
            session.go_on()
        cached, disk = client.send(session)
        # Where reasoning is dropped, what stands behind it has to be run again.
        assert before is None or cached > before or session.said
        assert disk == 0


# Minutes, for prompts of 60,000 tokens; the tests below have the same events in short sessions.
@pytest.mark.nightly
def test_a_session_of_full_size(fast_model, tmp_path):
    """Two sub-agents take turns with it, the server is started again, and it is compacted."""
    client, main = Client(), Session("main", FULL)
    helpers = [Session(name, FULL) for name in ("one", "two")]
    interval = SchedulerConfig().snapshot_interval
    settings = {"timeout": 3600, "max_memory_gb": 16, "prefix_cache_dir": str(tmp_path)}
    settings["interval"] = interval
    recurrent = fast_model.backend.open(1, drafts=False).needs_snapshots
    lost = interval if recurrent else 1
    with client.connected(fast_model, **settings):
        replay(client, main, TURNS // 4)
        for helper in helpers:
            client.send(helper, lost=lost)
        for _ in range(4):
            for session in (*helpers, main):
                replay(client, session, 1)
        replay(client, main, TURNS // 2 - main.turn)
    with client.connected(fast_model, **settings):
        main.go_on()
        cached, disk = client.send(main, lost=1 if recurrent else BLOCK_POSITIONS)
        assert cached == disk > FULL.system
        replay(client, main, TURNS - main.turn)
        assert len(client.prompts[-1]) >= 60_000
        main.compact()
        cached, _ = client.send(main, lost=lost)
        assert cached > FULL.system - lost


def test_sub_agents_take_turns(agent_model):
    client = Client()
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
    client, session = Client(), Session("main")
    recurrent = agent_model.backend.open(1, drafts=False).needs_snapshots
    with client.connected(agent_model):
        replay(client, session, 4)
        session.compact()
        cached, _ = client.send(session, lost=SHORT_INTERVAL if recurrent else 1)
        assert cached >= SHORT_INTERVAL
        session.go_on()
        client.send(session)


def test_a_session_goes_on_after_a_restart(agent_model, tmp_path):
    client, session = Client(), Session("main")
    settings = {"prefix_cache_dir": str(tmp_path)}
    recurrent = agent_model.backend.open(1, drafts=False).needs_snapshots
    with client.connected(agent_model, **settings):
        replay(client, session, 4)
    for _ in range(2):
        with client.connected(agent_model, **settings):
            session.go_on()
            # Blocks are whole; states of recurrent layers are stored where a prompt ended.
            cached, disk = client.send(session, lost=1 if recurrent else BLOCK_POSITIONS)
            assert cached == disk > SHORT_INTERVAL
            metrics = client.server.client.get("/metrics").text
            counted = 'treeflash:external_prefix_cache_hits_total{model="tiny"}'
            assert f"{counted} {float(disk)}" in metrics
            session.go_on()
            assert client.send(session)[1] == 0
