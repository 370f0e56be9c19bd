"""Grammars that would crash, stop or fill the server are refused, and it goes on."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from bodies import TEXT, chat, messages, responses, text
from recordings import recording
from servers import PATIENCE, check_error, serving, wait_until
from tool_models import tool_model

from treeflash.serving.errors import APIError
from treeflash.serving.models import ModelPool
from treeflash.serving.service import Service
from treeflash.text.grammar import Grammar, GrammarCompiler, GrammarError
from treeflash.text.grammar_sandbox import GrammarSandbox, SandboxError

pytestmark = pytest.mark.usefixtures("no_traceback")

MANY = 6000
"""References in a chain, of which half end a process with a stack of 8 MB."""


def chain(link, length=MANY, last=None):
    """A schema whose definitions each refer to the next one."""
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    definitions[f"d{length}"] = last or {"type": "string"}
    return {"$defs": definitions, "$ref": "#/$defs/d0"}


def nest(link, depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = link(schema)
    return schema


def rules(rule, length=MANY, name="r", define=":", start="start"):
    """A grammar whose rules each refer to the next one; names of capital letters are terminals."""
    lines = [f"{start} {define} {name}0"]
    for i in range(length):
        lines.append(f"{name}{i} {define} " + rule.replace("@", f"{name}{i + 1}"))
    return "\n".join([*lines, f'{name}{length} {define} "a"\n'])


def gbnf(rule, length=MANY):
    return rules(rule, length, define="::=", start="root")


LINKS = {
    "reference": lambda inner: inner,
    "array": lambda inner: {"type": "array", "items": inner},
    "prefix": lambda inner: {"type": "array", "prefixItems": [inner], "items": False},
    "property": lambda inner: {"type": "object", "properties": {"a": inner}},
    "two properties": lambda inner: {"type": "object", "properties": {"a": inner, "b": inner}},
    "any property": lambda inner: {"type": "object", "additionalProperties": inner},
    "pattern": lambda inner: {"type": "object", "patternProperties": {"^a$": inner}},
    "all": lambda inner: {"allOf": [inner]},
    "all twice": lambda inner: {"allOf": [inner, inner]},
    "any": lambda inner: {"anyOf": [inner, {"type": "null"}]},
    "any twice": lambda inner: {"anyOf": [inner, inner]},
    "one": lambda inner: {"oneOf": [inner]},
    "sibling": lambda inner: {"type": "string", **inner},
}
ALTERNATIVES = [
    {"anyOf": [{"properties": {f"{x}{i}": {"type": "null"}}} for x in "ab"]} for i in range(30)
]
SCHEMAS = {
    **{f"chain, {name}": chain(link) for name, link in LINKS.items()},
    **{f"nest, {name}": nest(LINKS[name], 300) for name in ("array", "property", "all", "any")},
    "nest, 900": nest(LINKS["array"], 450),
    "product": {"allOf": ALTERNATIVES},
    "patterns": {"allOf": [{"type": "string", "pattern": f"x{i}.*y{i}"} for i in range(200)]},
    "length": {"type": "string", "minLength": 10**18},
    "no text": {"$ref": "#"},
    "nothing": False,
}
LARK = {
    "rules": rules("@"),
    "rules, twice": rules("@ @"),
    "rules, groups": rules('((((@ "b"))))'),
    "rules, options": rules("[[@]]"),
    "rules, repeated": rules('(@ "b"){2,3}'),
    "rules, alternatives": rules('@ | "b" @'),
    "terminals": rules("@", 3 * MANY, name="R"),
    "terminals, sequence": rules('"b" @ "c"', name="R"),
    "terminals, alternatives": rules('("b" @ | "c")', name="R"),
    "terminals, not": rules('~("b" @ "c")', name="R"),
    "terminals, and": rules('/[ab]*/ & ("b" @)', name="R"),
    "terminals, doubled": rules("@ @", 40, name="R"),
    "groups": "start: " + "(" * 5000 + '"a"' + ")" * 5000,
    "options": "start: " + "[" * 5000 + '"a"' + "]" * 5000,
    "conditions": 'start: r::0\nr::_ : "a" %if ' + "not(" * 50000 + "true" + ")" * 50000,
    "grammars": "start: " + "%lark { start: " * 100 + '"a"' + " }" * 100,
    "schema": 'start: %json {"const": ' + "[" * 5000 + "]" * 5000 + "}",
    "intersection": "start: T\nT: " + " & ".join(f"/(?s:.*)x{i}(?s:.*)/" for i in range(90)),
    "automaton": "start: T\nT: " + " & ".join(f"/(a|b)*a(a|b){{{i}}}/" for i in range(90)),
    "sequence": "start: " + "s " * 60000 + '\ns: | "a" | s s',
    "circle": "start: T\nT: T",
    "count": 'start: "a"{1,1000000000000000000}',
}
GBNF = {
    "rules": gbnf("@ | @ @"),
    "terminals": gbnf('@ "b"'),
    "groups": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000,
    "lines": "\n" * 200_000 + "x",
    "long": 'root ::= "' + "a" * 3_000_000 + '"',
    "nothing": "",
}
REGEX = {
    "groups": "(" * 5000 + "a" + ")" * 5000,
    "stars": "(" * 200 + "a" + "*)" * 200,
    "options": "a?" * 20000 + "a" * 20000,
    "choices": "(a|b)?" * 20000,
    "classes": r"[\w--a]*" * 30000,
    "count": "a{1,1000000000000000000}",
    "no text": r"[^\s\S]",
}
REFUSED = {
    **{f"schema: {name}": Grammar.json(schema) for name, schema in SCHEMAS.items()},
    **{f"lark: {name}": Grammar.lark_or_gbnf(text) for name, text in LARK.items()},
    **{f"gbnf: {name}": Grammar.lark_or_gbnf(text) for name, text in GBNF.items()},
    **{f"regex: {name}": Grammar.regex(pattern) for name, pattern in REGEX.items()},
}
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
    "tree in definitions": Grammar.json(
        {
            "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}},
            "$ref": "#/$defs/t",
        }
    ),
    "anything": Grammar.json(True),
    "enum": Grammar.json({"enum": [f"value {i}" for i in range(2000)]}),
    "nested": Grammar.json(nest(LINKS["array"], 40)),
    "items": Grammar.json({"type": "array", "minItems": 10**9}),
    "length": Grammar.json({"type": "string", "maxLength": 10**6}),
    "choice": Grammar.choice([f"word {i}" for i in range(2000)]),
    "lark": Grammar.lark_or_gbnf(rules('@ "b"', 200)),
    "lark, terminals": Grammar.lark_or_gbnf(rules('@ "b"', 200, name="R")),
    "lark, doubled": Grammar.lark_or_gbnf(rules("@ @", 20)),
    "gbnf": Grammar.lark_or_gbnf(gbnf('@ "b"', 200)),
    "gbnf, groups": Grammar.lark_or_gbnf("root ::= " + "(" * 50 + '"a"' + ")" * 50),
    "regex, count": Grammar.regex("(a{1,1000000}b?){1,1000000}"),
    "regex, empty": Grammar.regex(""),
}


@pytest.fixture(scope="module")
def compiler(model):
    return GrammarCompiler(model.tokenizer, model.backend.vocab_size)


SLOW = {
    *("lark: conditions", "lark: intersection", "lark: sequence"),
    *("gbnf: rules", "gbnf: terminals", "gbnf: lines", "regex: options", "regex: choices"),
}
"""Their compilation is stopped after half a second, as with others of their kind."""


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.nightly if name in SLOW else ()) for name in REFUSED],
)
def test_refused(compiler, name):
    with pytest.raises(GrammarError, match=r"^invalid grammar: .") as caught:
        compiler.compile(REFUSED[name])
    assert "\n" not in str(caught.value)
    assert "<backtrace>" not in str(caught.value)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(compiler, name):
    assert compiler.compile(ACCEPTED[name])().allowed().any()


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ("schema: chain, array", "its references are nested too deep"),
        ("lark: terminals", "its references are nested too deep"),
        ("lark: intersection", "it takes more than 0.5 s to compile"),
        ("schema: nest, array", "recursion limit exceeded"),
        ("regex: no text", "no text matches it"),
        ("schema: no text", "no text matches it"),
    ],
)
def test_reasons(compiler, grammar, says):
    with pytest.raises(GrammarError, match=says):
        compiler.compile(REFUSED[grammar])


def test_a_schema_that_python_cannot_write(compiler):
    with pytest.raises(GrammarError, match="nested too deep"):
        compiler.compile(Grammar.json(nest(LINKS["all"], 100_000)))


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
        compiler.parts[1].run(REFUSED["lark: intersection"].entries, patience=0.01)


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
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    fresh = replace(model)  # which has no process yet
    service = Service(SimpleNamespace(model=fresh), {}, ("model",))
    with pytest.raises(APIError, match="cannot compile grammars now") as caught:
        asyncio.run(service.compile(ACCEPTED["tree"], "response_format"))
    assert caught.value.status == 503


# Hundreds of grammars; `test_refused` and `test_accepted` have chains of every kind.
@pytest.mark.nightly
def test_random_chains(compiler):
    """Chains of random links, lengths and order, with sides that meet again."""
    rng = np.random.default_rng(0)
    names, refused = list(LINKS), []
    for _ in range(25):
        length = int(10 ** rng.uniform(1, 4))
        definitions = {}
        for i in rng.permutation(length):
            target = int(rng.integers(0, length)) if rng.random() < 0.02 else i + 1
            link = LINKS[names[rng.integers(len(names))]]
            definitions[f"d{i}"] = link({"$ref": f"#/$defs/d{target}"})
        definitions[f"d{length}"] = {"type": "string"}
        try:
            compiler.compile(Grammar.json({"$defs": definitions, "$ref": "#/$defs/d0"}))
            refused.append(False)
        except GrammarError:
            refused.append(True)
    assert set(refused) == {False, True}


# Through the endpoints.
FIRST = chain(LINKS["reference"], 3000)


def json_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def function(schema, **fields):
    return {"type": "function", "function": {"name": "f", "parameters": schema, **fields}}


def response_tool(schema, **fields):
    return {"type": "function", "name": "f", "parameters": schema, **fields}


def message_tools(schema):
    tool = {"name": "f", "description": "F.", "input_schema": {"type": "object", **schema}}
    return {"tools": [tool], "tool_choice": {"type": "any"}}


def form(schema, **fields):
    return {"format": {"type": "json_schema", "schema": schema, **fields}}


REQUESTS = [
    (chat(response_format=json_format(FIRST)), "response_format"),
    (chat(response_format=json_format(SCHEMAS["chain, array"]), stream=True), "response_format"),
    (chat(structured_outputs={"json": SCHEMAS["nest, 900"]}), "structured_outputs"),
    (chat(structured_outputs={"grammar": LARK["rules, twice"]}), "structured_outputs"),
    (chat(structured_outputs={"grammar": GBNF["groups"]}), "structured_outputs"),
    (chat(structured_outputs={"regex": REGEX["options"]}), "structured_outputs"),
    (chat(tools=[function(FIRST)], tool_choice="required"), "tool_choice"),
    (chat(tools=[function(SCHEMAS["nest, array"], strict=True)]), "tools"),
    (text(response_format=json_format(FIRST)), "response_format"),
    (text(structured_outputs={"json": SCHEMAS["chain, any"]}), "structured_outputs"),
    (text(structured_outputs={"grammar": LARK["terminals"]}), "structured_outputs"),
    (text(structured_outputs={"regex": REGEX["no text"]}), "structured_outputs"),
    (responses(text=form(SCHEMAS["nest, all"], name="x")), "text"),
    (responses(tools=[response_tool(FIRST)], tool_choice="required"), "tool_choice"),
    (responses(tools=[response_tool(SCHEMAS["chain, property"], strict=True)]), "tools"),
    (messages(output_config=form(SCHEMAS["patterns"])), None),
    (messages(**message_tools(FIRST)), None),
]
"""Each place of a grammar in a request. The first kills a server that compiles it, as most others
do."""


@pytest.fixture(scope="module")
def hardened(tmp_path_factory):
    # The prompt has the tools: some are long.
    with serving(tool_model(tmp_path_factory.mktemp("tools")), {"temperature": 0}) as running:
        yield running


@pytest.mark.sample(6)
@pytest.mark.parametrize(("request_", "param"), REQUESTS, ids=range(len(REQUESTS)))
def test_requests(hardened, request_, param):
    check_error(hardened.post(*request_), 400, "invalid grammar: ", param=param)
    assert hardened.chat(max_tokens=2).status_code == 200


def test_grammars_that_wait_leave_threads_for_prompts(hardened, monkeypatch):
    release, many = threading.Event(), 40  # more than `asyncio.to_thread` has threads

    def compile(self, grammar):
        release.wait(2 * PATIENCE)
        raise GrammarError("it takes too much")

    monkeypatch.setattr(GrammarCompiler, "compile", compile)
    path, body = text(structured_outputs={"regex": "a"})
    unlimited = httpx.Client(base_url=hardened.url, limits=httpx.Limits(), timeout=PATIENCE)
    with unlimited as client, ThreadPoolExecutor(many) as clients:
        with recording(ModelPool, "find") as asked:
            refused = [clients.submit(client.post, path, json=body) for _ in range(many)]
            try:
                wait_until(lambda: len(asked) == many)
                assert hardened.post("/tokenize", {"prompt": "Hi"}).status_code == 200
            finally:
                release.set()
        assert {asked.result().status_code for asked in refused} == {400}


def test_others_go_on(hardened):
    body = {"prompt": "Hi", "max_tokens": 120, "ignore_eos": True}

    def streamed():
        frames = hardened.frames(TEXT, **body)
        return "".join(choice["text"] for frame in frames for choice in frame["choices"])

    alone = streamed()
    with ThreadPoolExecutor(2) as clients:
        others = [clients.submit(streamed) for _ in range(2)]
        wait_until(lambda: hardened.engine.unfinished == 2)
        assert {hardened.post(*request).status_code for request, _ in REQUESTS[:4]} == {400}
        assert [other.result() for other in others] == [alone] * 2


def test_legitimate_requests(hardened):
    """After all of these, the server still follows grammars."""
    fields = {"max_tokens": 40, "structured_outputs": {"json": TREE}}
    response = hardened.chat(**fields, chat_template_kwargs={"enable_thinking": False})
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"].lstrip().startswith("{")
