"""Grammars that would crash, stop or fill the server are refused, and it goes on."""

from __future__ import annotations

import asyncio
import gc
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from bodies import TEXT, chat, text
from recordings import recording
from servers import PATIENCE, check_error, wait_until
from stand_ins import stand_in

from treeflash.serving.errors import APIError
from treeflash.serving.models import ModelPool
from treeflash.serving.service import Service
from treeflash.text.grammar import Grammar, GrammarCompiler, GrammarError
from treeflash.text.grammar_sandbox import GrammarSandbox, SandboxError

pytestmark = pytest.mark.usefixtures("no_traceback")

LINKS = {
    "reference": lambda inner: inner,
    "array": lambda inner: {"type": "array", "items": inner},
    "prefix": lambda inner: {"type": "array", "prefixItems": [inner], "items": False},
    "property": lambda inner: {"type": "object", "properties": {"a": inner}},
    "two properties": lambda inner: {"type": "object", "properties": {"a": inner, "b": inner}},
    "any property": lambda inner: {"type": "object", "additionalProperties": inner},
    "pattern": lambda inner: {"type": "object", "patternProperties": {"^a$": inner}},
    "all": lambda inner: {"allOf": [inner]},
    "any": lambda inner: {"anyOf": [inner, {"type": "null"}]},
    "one": lambda inner: {"oneOf": [inner]},
    "sibling": lambda inner: {"type": "string", **inner},
}


def chain(link, length):
    """A schema whose definitions each refer to the next one."""
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$defs": {**definitions, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def nest(link, depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = link(schema)
    return schema


def rules(rule, length, name="r", define=":", start="start"):
    """A grammar whose rules each refer to the next one; names of capital letters are terminals."""
    lines = [f"{start} {define} {name}0"]
    for i in range(length):
        lines.append(f"{name}{i} {define} " + rule.replace("@", f"{name}{i + 1}"))
    return Grammar.lark_or_gbnf("\n".join([*lines, f'{name}{length} {define} "a"\n']))


def gbnf(rule, length):
    return rules(rule, length, define="::=", start="root")


MANY = 6000
"""References in a chain, of which half end a process with a stack of 8 MB."""
TOO_DEEP, TOO_LONG = "its references are nested too deep", "it takes more than 0.5 s to compile"
INTERSECTION = Grammar.lark(
    "start: T\nT: " + " & ".join(f"/(?s:.*)x{i}(?s:.*)/" for i in range(90))
)
PATTERNS = {"allOf": [{"type": "string", "pattern": f"x{i}.*y{i}"} for i in range(200)]}
REFUSED = {
    "chain of references": (Grammar.json(chain(LINKS["reference"], MANY)), TOO_DEEP),
    "chain of arrays": (Grammar.json(chain(LINKS["array"], MANY)), TOO_DEEP),
    "nested arrays": (Grammar.json(nest(LINKS["array"], 300)), "recursion limit exceeded"),
    "nested for Python": (Grammar.json(nest(LINKS["all"], 100_000)), "it is nested too deep"),
    "patterns": (Grammar.json(PATTERNS), TOO_LONG),
    "a schema without a text": (Grammar.json({"$ref": "#"}), "no text matches it"),
    "unknown type": (Grammar.json({"type": "objekt"}), "objekt"),
    "rules": (rules("@ @", MANY), TOO_DEEP),
    "terminals": (rules("@", 3 * MANY, name="R"), TOO_DEEP),
    "intersection": (INTERSECTION, TOO_LONG),
    "missing rule": (Grammar.lark("start: missing"), "missing"),
    "circle": (Grammar.lark("start: T\nT: T"), "circular reference"),
    "rules of GBNF": (gbnf('@ "b"', MANY), TOO_LONG),
    "groups of GBNF": (
        Grammar.lark_or_gbnf("root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
        "maximum recursion depth exceeded",
    ),
    "no GBNF": (Grammar.lark_or_gbnf(""), "No 'root' rule found"),
    "groups": (Grammar.regex("(" * 5000 + "a" + ")" * 5000), "invalid regex"),
    "open class": (Grammar.regex("[a-"), "invalid regex"),
    "count": (Grammar.regex("a{1,1000000000000000000}"), "invalid regex"),
    "a regex without a text": (Grammar.regex(r"[^\s\S]"), "no text matches it"),
}
"""Grammars, and why each is refused."""
SLOW = {name for name, (_, reason) in REFUSED.items() if reason == TOO_LONG} - {"intersection"}
"""They are stopped after half a second of work, as that one."""
TREE = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "children": {"type": "array", "items": {"$ref": "#"}},
    },
    "required": ["name"],
    "additionalProperties": False,
}
ALL_TO_ALL = {
    f"d{i}": {
        "type": "object",
        "properties": {f"p{j}": {"$ref": f"#/$defs/d{j}"} for j in range(40)},
    }
    for i in range(40)
}
ACCEPTED = {
    **{f"chain, {name}": Grammar.json(chain(link, 50)) for name, link in LINKS.items()},
    "200 definitions": Grammar.json(chain(LINKS["two properties"], 200)),
    "400 definitions": Grammar.json(chain(LINKS["property"], 400)),
    "all to all": Grammar.json({"$defs": ALL_TO_ALL, "$ref": "#/$defs/d0"}),
    "tree": Grammar.json(TREE),
    "anything": Grammar.json(True),
    "enum": Grammar.json({"enum": [f"value {i}" for i in range(2000)]}),
    "nested": Grammar.json(nest(LINKS["array"], 40)),
    "length": Grammar.json({"type": "string", "maxLength": 10**6}),
    "choice": Grammar.choice([f"word {i}" for i in range(2000)]),
    "lark": rules('@ "b"', 200),
    "lark, terminals": rules('@ "b"', 200, name="R"),
    "lark, doubled": rules("@ @", 20),
    "gbnf": gbnf('@ "b"', 200),
    "gbnf, groups": Grammar.lark_or_gbnf("root ::= " + "(" * 50 + '"a"' + ")" * 50),
    "regex, count": Grammar.regex("(a{1,1000000}b?){1,1000000}"),
    "regex, empty": Grammar.regex(""),
}
"""As large as honest ones are."""


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.nightly] if name in SLOW else [])
        for name, case in REFUSED.items()
    ],
)
def test_refused(compiler, grammar, reason):
    with pytest.raises(GrammarError, match=rf"^invalid grammar: .*{re.escape(reason)}") as caught:
        compiler.compile(grammar)
    assert "\n" not in str(caught.value)
    assert "<backtrace>" not in str(caught.value)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(compiler, name):
    assert compiler.compile(ACCEPTED[name])().allowed().any()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not bound memory")
def test_memory_is_bounded():
    code = (
        "from mmap import mmap\n"  # which writes nothing, and so is quick
        "from treeflash.text.grammar_sandbox import MEMORY, _limit_memory\n"
        "_limit_memory()\n"
        "mmap(-1, MEMORY // 2)\n"
        "mmap(-1, 2 * MEMORY)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "line 5" in done.stderr
    assert "Cannot allocate memory" in done.stderr


def test_a_process_that_was_killed_is_replaced(compiler):
    compiler.compile(ACCEPTED["tree"])
    compiler.parts[1].process.kill()
    compiler.parts[1].process.wait()
    compiler.compile(ACCEPTED["tree"])


def test_a_process_that_does_not_answer_is_killed(compiler):
    compiler.compile(ACCEPTED["tree"])
    with pytest.raises(SandboxError, match="it takes too much memory or time to compile"):
        compiler.parts[1].run(INTERSECTION.entries, patience=0.01)


def test_a_process_that_cannot_begin():
    with pytest.raises(OSError, match="the process for grammars ended"):
        GrammarSandbox({"tokenizer": "", "n_vocab": 1}).run([])


def test_the_process_ends_with_its_compiler(model):
    compiler = GrammarCompiler(model.tokenizer, model.backend.vocab_size)
    compiler.compile(ACCEPTED["tree"])
    process = compiler.parts[1].process
    del compiler
    gc.collect()
    assert process.wait(PATIENCE) != 0


def test_no_process_can_be_started(model, monkeypatch):
    stand_in(monkeypatch, sys, executable="/nowhere/python")
    fresh = replace(model)  # which has no process yet
    service = Service(SimpleNamespace(model=fresh), {}, "model", nullcontext)
    with pytest.raises(APIError, match="cannot compile grammars now") as caught:
        asyncio.run(service.compile(ACCEPTED["tree"], "response_format"))
    assert caught.value.status == 503


@pytest.mark.parametrize("request_", [chat, text])
@pytest.mark.parametrize(
    "wrong", [{"json": {"type": "objekt"}}, {"regex": "("}, {"grammar": "root ::= missing"}]
)
def test_structured_outputs_are_refused(server, request_, wrong):
    response = server.post(*request_(structured_outputs=wrong))
    check_error(response, 400, "invalid grammar: ", param="structured_outputs")


def test_grammars_that_wait_leave_threads_for_prompts(server, monkeypatch):
    release, many = threading.Event(), 40  # more than `asyncio.to_thread` has threads

    def compile(self, grammar):
        release.wait(2 * PATIENCE)
        raise GrammarError("it takes too much")

    stand_in(monkeypatch, GrammarCompiler, compile=compile)
    path, body = text(structured_outputs={"regex": "a"})
    unlimited = httpx.Client(base_url=server.url, limits=httpx.Limits(), timeout=PATIENCE)
    with unlimited as client, ThreadPoolExecutor(many) as clients:
        with recording(ModelPool, "find") as asked:
            refused = [clients.submit(client.post, path, json=body) for _ in range(many)]
            try:
                wait_until(lambda: len(asked) == many)
                assert server.post("/tokenize", {"prompt": "Hi"}).status_code == 200
            finally:
                release.set()
        assert {asked.result().status_code for asked in refused} == {400}


def test_others_go_on(server):
    """A grammar that kills the process that compiles it delays nobody, nor does the next one."""
    body = {"prompt": "Hi", "max_tokens": 120, "ignore_eos": True}

    def streamed():
        return "".join(x["text"] for x in server.choices(TEXT, stream=True, **body))

    alone = streamed()
    with ThreadPoolExecutor(2) as clients:
        others = [clients.submit(streamed) for _ in range(2)]
        wait_until(lambda: server.engine.unfinished == 2)
        for schema in (chain(LINKS["reference"], MANY), PATTERNS):
            response = server.complete("Hi", structured_outputs={"json": schema})
            check_error(response, 400, "invalid grammar: ")
        assert [other.result() for other in others] == [alone] * 2
    answer = server.complete("Hi", structured_outputs={"json": TREE}, max_tokens=1).json()
    assert answer["choices"][0]["text"] in ("{", " ", "\n")
