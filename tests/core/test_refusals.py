"""What is refused: values of settings, prompts, command lines and models, each with one message.

What settings allow comes first. Commands that go on for a while (chats, runs of the doctor) have
tables of their own.
"""

import asyncio
import json
import shlex
from dataclasses import FrozenInstanceError, replace
from importlib.util import find_spec
from typing import Any

import pytest
from byte_tokens import save_tokenizer
from failures import failing

from treeflash import language_model
from treeflash.cli.console import Parser
from treeflash.cli.options import add_decode_options, decode_options
from treeflash.command import main
from treeflash.config import DTYPES, METHODS, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.errors import BackendError, ConfigError, PromptError, TreeflashError
from treeflash.language_model import load
from treeflash.registry import installed
from treeflash.testing.models import write_drafter, write_target


def test_a_top_k_of_minus_one_is_off():
    assert SamplingConfig(temperature=1.0, top_k=-1) == SamplingConfig(temperature=1.0)


def test_edges_are_allowed():
    SamplingConfig(temperature=0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
    SamplingConfig(temperature=1e-6, top_k=10**9, top_p=1e-9, min_p=1.0, seed=2**64 - 1)
    DecodeConfig(budget=1024)
    DecodeConfig(budget=1, top_m=1, top_k_children=1, draft_temperature=1e-3, max_tokens=1)
    for dtype in (None, *DTYPES):
        assert LoadConfig(dtype=dtype).dtype == dtype


@pytest.mark.parametrize("config", [SamplingConfig, DecodeConfig, LoadConfig])
def test_unknown_settings_and_settings_without_a_name_raise(config):
    with pytest.raises(TypeError, match="bugdet"):
        config(bugdet=3)
    with pytest.raises(TypeError, match="positional"):
        config(1)


def test_settings_are_frozen():
    config = DecodeConfig()
    with pytest.raises(FrozenInstanceError):
        config.budget = 3  # type: ignore[misc]


def test_replacing_checks_again():
    with pytest.raises(ConfigError, match="budget"):
        replace(DecodeConfig(), budget=-3)


def test_defaults():
    config = DecodeConfig()
    assert config.method == "treeflash"
    assert (config.budget, config.top_m, config.top_k_children) == ("auto", 16, 16)
    assert config.draft_temperature == 1
    assert config.sampling == SamplingConfig()
    assert config.sampling.greedy


def test_greedy_is_temperature_zero():
    assert SamplingConfig(temperature=0, top_k=3, seed=9).greedy
    assert not SamplingConfig(temperature=1e-3).greedy


def test_what_each_method_needs():
    configs = [DecodeConfig(method=method) for method in METHODS]
    assert [config.drafts for config in configs] == [False, True, True, True, True, False]
    assert [config.uses_head for config in configs] == [False, False, False, True, True, False]
    assert [config.drafts_chain for config in configs] == [False, True, False, False, True, False]
    assert [config.copies for config in configs] == [False, False, True, True, False, True]
    configs = [replace(config, suffix=False) for config in configs]
    assert [config.copies for config in configs] == [False, False, False, False, False, True]


NAN, INF = float("nan"), float("inf")

POSITIVE = "must be 1 or more"
WHOLE = "must be a whole number, 1 or more"

RULES: list[tuple[type, str, str, tuple[Any, ...]]] = [
    (
        SamplingConfig,
        "temperature",
        "must be 0 (greedy), or from 1e-6 to 1e6",
        (1e-310, -0.1, INF, NAN, None),
    ),
    (SamplingConfig, "top_k", "must be -1 or more", (-2,)),
    (SamplingConfig, "top_k", "must be a whole number, -1 or more", (1.5,)),
    (SamplingConfig, "top_p", "must be above 0 and at most 1", (0.0, 1.01, NAN)),
    (SamplingConfig, "min_p", "must be between 0 and 1", (-0.5, 1.5, NAN)),
    (SamplingConfig, "seed", "must be between 0 and 2**64 - 1", ("1", -1, 2**64)),
    (DecodeConfig, "budget", "must be auto, or from 1 to 1024 nodes", (0, -3, 100_000, True)),
    (DecodeConfig, "head_vocab", POSITIVE, (-1,)),
    (DecodeConfig, "head_vocab", WHOLE, ("full",)),
    (DecodeConfig, "max_tokens", POSITIVE, (0,)),
    (DecodeConfig, "max_tokens", WHOLE, ("16",)),
    (DecodeConfig, "top_m", POSITIVE, (0,)),
    (DecodeConfig, "top_k_children", POSITIVE, (0,)),
    (
        DecodeConfig,
        "draft_temperature",
        "must be from 1e-6 to 1e6",
        (1e-320, 1e308, 0.0, -1.0, INF, NAN),
    ),
    (DecodeConfig, "calibration", "must be True or False", ("off",)),
    (DecodeConfig, "stop_token_ids", "must be a frozenset of token ids", ([2],)),
    (LoadConfig, "device", "must be the name of a device, such as cpu or cuda:1", (0, "")),
    (LoadConfig, "device_map", "must be auto, or None for one device", ("balanced",)),
    (LoadConfig, "draft_bits", POSITIVE, (0,)),
    (LoadConfig, "draft_window", POSITIVE, (0,)),
    (LoadConfig, "kv_bits", WHOLE, ("8",)),
    (LoadConfig, "memory_gb", "must be above 0", (0, -1.0)),
]
"""By configuration and setting, the rule that a message states, and values that break it."""

CASES = [
    pytest.param(kind, name, value, f"{name} {rule}, got {value!r}", id=f"{name}={value!r}")
    for kind, name, rule, values in RULES
    for value in values
]

NUMBERS = [
    case
    for case in CASES
    if case.values[0] is not LoadConfig
    and type(case.values[2]) in (int, float)
    and case.values[1:3] != ("top_k", 1.5)  # the parser of arguments takes no such number
]


@pytest.mark.parametrize(("kind", "name", "value", "message"), CASES)
def test_a_value_is_refused(kind, name, value, message):
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TreeflashError)


@pytest.mark.parametrize(("kind", "name", "value", "message"), NUMBERS)
def test_a_value_is_refused_on_the_command_line_before_loading(kind, name, value, message):
    parser = Parser("test", "A test.")
    add_decode_options(parser)
    with pytest.raises(ConfigError) as caught:
        decode_options(parser.parse_args([f"--{name.replace('_', '-')}={value!r}"]))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("kind", "name", "value", "choices"),
    [
        (DecodeConfig, "method", "beam", "ar, dflash, ddtree, treeflash, treeflash-chain, suffix"),
        (LoadConfig, "dtype", "int4", "float32, bfloat16, float16"),
    ],
)
def test_an_unknown_choice_is_refused(kind, name, value, choices):
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    assert str(caught.value) == f"unknown {name} {value!r}; choose one of {choices}"


DEEP = "[" * 100_000

BIAS = "logit_bias must be a mapping of token ids"

NUMBER = "logit_bias must give one number per token id, neither inf nor NaN, got"

REQUESTS: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "the prompt is empty"),
    ([], {}, "the prompt is empty"),
    ("\ud800", {}, "Unicode"),
    ([1.5], {}, "a prompt is a string"),
    (b"hi", {}, "a prompt is a string, .*, got bytes"),
    (None, {}, "a prompt is a string, .*, got NoneType"),
    ([{"role": "user"}], {}, "message 1 needs"),
    ([{"role": "user", "content": 3}], {}, "message 1 needs"),
    ([300], {}, "vocabulary"),
    ([-1], {}, "vocabulary"),
    ("a" * 500, {}, "limit"),
    ("hi", {"raw": True, "system": "x"}, "raw"),
    ([{"role": "user", "content": "x"}], {"raw": True}, "raw"),
    ([5], {"system": "x"}, "remove the system message"),
    ([{"role": "system", "content": "x"}], {"system": "x"}, "begin with a system message"),
    *(
        ("hi", options, message)
        for options, message in (
            ({"tempature": 1}, r"unknown option 'tempature' \(did you mean temperature\?\)"),
            ({"stop": [1]}, "stop must be a string"),
            ({"stop": None}, "stop must be a string"),
            ({"stop": ["a", ""]}, "stop string is empty"),
            ({"budget": 0}, "budget must be"),
            ({"stop_token_ids": None}, "stop_token_ids must be token ids, got None"),
            ({"stop_token_ids": ["</s>"]}, "stop_token_ids must be token ids"),
            ({"system": ""}, "system must be a string that is not empty, got ''"),
            ({"template_args": [1]}, "template_args must be a mapping"),
            ({"top_p": 0}, "top_p must be"),
            ({"top_p": 10**400}, "top_p must be above 0 and at most 1"),
            ({"log_probs": -1}, "log_probs must be 0 or more"),
            ({"max_tokens": 2.5}, r"max_tokens must be a whole number, 1 or more, got 2\.5"),
            ({"top_p": "1"}, "top_p must be a number, above 0 and at most 1, got '1'"),
            ({"repetition_penalty": 0}, "repetition penalty must be above 0"),
            ({"presence_penalty": "x"}, "presence penalty must be a finite number"),
            ({"presence_penalty": 10**400}, "presence penalty must be a finite number"),
            ({"frequency_penalty": INF}, "frequency penalty must be a finite number"),
            ({"logit_bias": [(1, 2)]}, BIAS),
            ({"logit_bias": {"1": 2}}, BIAS),
            ({"logit_bias": {-1: 2}}, "logit_bias must give one number per token id"),
            ({"logit_bias": {1: "x"}}, "logit_bias must give one number per token id"),
            ({"logit_bias": {5: NAN}}, NUMBER),
            ({"logit_bias": {5: INF}}, NUMBER),
            ({"logit_bias": {5: -(10**400)}}, NUMBER),
            ({"logit_bias": {1000: 1}}, "logit_bias has the token id 1000"),
        )
    ),
]
"""Prompts and options of Python, and the message about them."""

ENTRIES = {
    "stream": lambda model, prompt, options: model.stream(prompt, **options),
    "many": lambda model, prompt, options: model.generate_many(["hi", prompt], **options),
    "asynchronous": lambda model, x, options: asyncio.run(model.agenerate(x, **options)),
}


@pytest.mark.parametrize(("prompt", "options", "message"), REQUESTS)
@pytest.mark.parametrize("ask", ENTRIES.values(), ids=ENTRIES)
def test_a_request_is_refused_before_decoding(scripted, ask, prompt, options, message):
    model = scripted("An answer.")
    with pytest.raises((PromptError, ConfigError), match=message):
        ask(model, prompt, options)
    assert not model.backend.opened


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("hi", {}, "prompts must be a list"),
        (["hi", ""], {}, "prompt 1: the prompt is empty"),
        (["hi"], {"n": 0}, "n must be 1 or more, got 0"),
        (["hi"], {"parallel": 0}, "parallel must be auto, or 1 or more, got 0"),
        (["hi"], {"parallel": 1.5}, "parallel must be auto, or 1 or more, got 1.5"),
    ],
)
def test_many_requests_are_refused_at_once(scripted, prompts, options, message):
    model = scripted("An answer.")
    with pytest.raises((PromptError, ConfigError), match=message):
        model.generate_many(prompts, **options)
    assert not model.backend.opened


def write_files(folder):
    """Write the files that the command lines below name."""
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("\n")
    (folder / "rows.jsonl").write_text('{"id": 1, "prompt": "x"}\n')
    (folder / "mean.jsonl").write_text('{"id": 1, "prompt": "x"}\n')
    (folder / "bad.jsonl").write_text('{"id": 1, "prompt": "x"}\n{"id": \n')
    (folder / "other.jsonl").write_text('{"some": "thing"}\n{"else": 1}\n')


SINGLE = "is for a single prompt"

BUDGETS = "--budgets takes numbers of 1 or more separated by commas, not"


def unwritable(option: str) -> list[tuple[str, str]]:
    """Return values of an option whose folder cannot be made, and what is said about them."""
    return [
        (f"{option} rows.jsonl", "rows.jsonl cannot be written: Not a directory"),
        (f"{option} rows.jsonl/new/run", "new/run cannot be written: Not a directory"),
    ]


COMMANDS: dict[str, list[tuple[str, str]]] = {
    "generate": [
        ("--budget 0 hi", "budget must be auto, or from 1 to 1024 nodes, got 0"),
        ("--budget many hi", "must be auto or a number of nodes, got many"),
        ("--budget", "argument --budget"),
        ("--bud 8 hi", "unrecognized arguments: --bud hi (did you mean --budget?); see --help"),
        ("--max-token 8 --prompts x.jsonl", "unrecognized arguments: --max-token (did you mean"),
        ("--head-rows many hi", "must be full, auto or a number of tokens, got many"),
        ("--suffix maybe hi", "must be on or off, got maybe"),
        ("--calibration maybe hi", "must be on or off, got maybe"),
        ("--suffix-cache-gb 1 hi", "--suffix-cache-gb needs --prompts; remove it for a single"),
        ("--suffix-cache-gb -1 hi", "'-1' is not a number of GiB, 0 or more"),
        ("--suffix-cache-gb x hi", "'x' is not a number of GiB, 0 or more"),
        ("--temperature hot hi", "invalid float value"),
        ("--method magic hi", "invalid choice"),
        ("--dtype int8 hi", "int8"),
        ("--stop= hi", "stop string is empty"),
        ("--nonsense hi", "unrecognized arguments: --nonsense; see --help"),
        ("one two", "unrecognized arguments: two (a text with spaces needs quotes); see"),
        ("hi --prompt-file x", "not allowed with"),
        ("--prompt-file missing.txt", "missing.txt cannot be read"),
        ("--prompt-file .", "cannot be read"),
        ("--prompt-file latin.txt", "not UTF-8"),
        ("--prompt-file empty.txt", "is empty"),
        ("' \n'", "empty"),
        ("--explain hi", "put the prompt before --explain"),
        ("--explain=0 hi", "not a number of iterations"),
        ("--chat-template-args {x} hi", "invalid JSON"),
        (f"--chat-template-args {DEEP} hi", "invalid JSON"),
        ("--chat-template-args [] hi", "must be a JSON object"),
        ("--raw --system x hi", "raw"),
        ("--system a\udcff hi", "the system message is not valid Unicode"),
        ("a\udcff", "the prompt is not valid Unicode; was it saved as UTF-8?"),
        ("--prompts rows.jsonl", "--output"),
        ("--logit-bias {x} hi", "invalid JSON"),
        ("--logit-bias '{\"x\":1}' hi", "must be numbers by token id"),
        (f"--logit-bias '{{\"1\":1{'0' * 400}}}' hi", "must be numbers by token id"),
        ("--logit-bias '{\"1\":NaN}' hi", "logit_bias must give one number per token id"),
        ("--json-schema [] hi", "must be a JSON object"),
        ("--json-schema @missing.json hi", "missing.json cannot be read"),
        ("--regex a --grammar b hi", "grammar and regex exclude each other"),
        ("--regex ( hi", "invalid grammar"),
        ("--grammar 'start: (' hi", "invalid grammar"),
        ("--grammar 'root ::= (' hi", "invalid grammar"),
        ('--json-schema \'{"type": "nothing"}\' hi', "invalid grammar"),
        ("--logprobs -1 hi", "log_probs must be 0 or more"),
        ("--n 0 hi", "n must be 1 or more, got 0"),
        ("--n 2 --compare hi", "--compare and --explain are for a single answer"),
        ("--parallel 2 hi", "--parallel needs --prompts"),
        ("--output out.jsonl hi", "must be given together"),
        *(
            (f"--prompts rows.jsonl --output out.jsonl {options}", message)
            for options, message in (
                ("--n 2", f"--n {SINGLE}"),
                ("--compare", f"--compare {SINGLE}"),
                ("--explain", f"--explain {SINGLE}"),
                ("--json", f"--json {SINGLE}"),
                ("--image a.png", f"--image {SINGLE}"),
                ("--output no/out.jsonl", "no/out.jsonl cannot be written"),
                ("--output .", ". cannot be written"),
                ("--output rows.jsonl", "is the file of prompts"),
                ("--output other.jsonl", "other.jsonl:1 was not written by"),
                ("--prompts bad.jsonl", "bad.jsonl:2"),
                ("--prompts missing.jsonl", "missing.jsonl cannot be read"),
                ("--prompts empty.txt", "has no prompts"),
                *((f"--parallel={x}", f"of sequences, got {x}") for x in ("0", "-1", "1.5", "x")),
            )
        ),
        ("Hi --image missing.png", "image 1: missing.png cannot be read: No such file"),
        ("Hi --image http://a/b.png", "image 1: http://a/b.png is a URL, and images are never"),
        ("Hi --image empty.txt", "image 1: the file is not a PNG, JPEG, WebP or GIF image"),
        ("Hi --image a.png --raw", "images need the chat template; remove --raw"),
        ("Hi --image a.png --max-images 0", "max_images must be 1 or more, got 0"),
    ],
    "evaluate": [
        *(
            (f"--prompts rows.jsonl {options}", message)
            for options, message in (
                ("--methods beam", "unknown method 'beam'; choose one of ar, dflash,"),
                ("--methods ''", "unknown method ''"),
                ("--budgets 16,x", f"{BUDGETS} '16,x'"),
                ("--budgets 0", f"{BUDGETS} '0'"),
                ("--limit 0", "--limit must be 1 or more, got 0"),
                ("--max-tokens 1", "max_tokens must be 2 or more"),
                ("--temperature -1", "temperature must be 0"),
                ("--seed -1", "seed must be between"),
                ("--output no/such/folder/out.json", "out.json cannot be written: No such file"),
                ("--output .", ". cannot be written: Is a directory"),
                ("--output rows.jsonl", "is a file of prompts"),
                ("--report out.pdf", "--report writes FILE.html or FILE.png"),
                ("--output a.html --report ./a.html", "--output and --report are both a.html"),
                ("--nonsense", "unrecognized arguments: --nonsense"),
            )
        ),
        ("--prompts missing.jsonl", "missing.jsonl cannot be read"),
        ("--prompts rows.jsonl rows.jsonl", "'rows' is taken"),
        ("--prompts mean.jsonl", "'mean' is taken"),
    ],
    "serve": [
        *unwritable("--prefix-cache-dir"),
        ("--system a\udcff", "the system message is not valid Unicode"),
        ("--model-name ' '", "argument --model-name: a name is empty; remove it"),
        *(
            (f"--cors-origin '{origin}'", f"such as https://example.com, got '{origin}'")
            for origin in ("", "example.com", "localhost:3000", "https://example.com/")
        ),
    ],
    "chat": unwritable("--prefix-cache-dir"),
    "train": unwritable("--responses rows.jsonl --output"),
    "adapt": unwritable("--prompts rows.jsonl --output"),
    "distill": [
        ("--prompts rows.jsonl --output .", ". cannot be written"),
        ("--prompts rows.jsonl --output no/out.jsonl", "no/out.jsonl cannot be written"),
    ],
    "drafters": [
        *((f"'{name}'", f"'{name}' is not a folder") for name in ("", "./nowhere", "a model")),
        ("rows.jsonl", "rows.jsonl is a file; pass a folder"),
    ],
    "models": [
        ("--api-key-file rows.jsonl", "--api-key-file is for a running server; add --server"),
        ("--download a --server", "argument --server: not allowed with argument --download"),
        *(
            (f"rm a {option}", "rm deletes models of this machine; remove --server or --download")
            for option in ("--server", "--download b")
        ),
        *(
            (f"--server '{url}'", f"'{url}' is not the address of a server, such as http://")
            for url in (
                "",
                "localhost:8000",
                "file:///etc",
                "http://",
                "http://[",
                "http://a:99999",
            )
        ),
    ],
}
"""By command, arguments that are refused before a model is loaded, and the message about them."""


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        pytest.param(command, arguments, message, id=f"{command} {arguments[:60]}")
        for command, cases in COMMANDS.items()
        for arguments, message in cases
    ],
)
@pytest.mark.usefixtures("nothing_loads")
def test_a_command_line_is_refused_before_loading(
    tmp_path, monkeypatch, capsys, command, arguments, message
):
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([command, *shlex.split(arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert (tmp_path / "rows.jsonl").read_text() == '{"id": 1, "prompt": "x"}\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--backend abacus", "unknown backend 'abacus'"),
        ("--backend ''", "unknown backend ''"),
        ("--device ''", "device must be the name of a device, such as cpu or cuda:1, got ''"),
        ("--device cuda", "device must be cpu"),
        ("--dtype float16", "dtype must be float32"),
        ("--target /no/where", "is not a folder"),
        ("--target ''", "'' is not a folder"),
        ("--drafter /no/where", "is not a folder"),
        # The model decides which special tokens there are.
        ("--grammar 'start: <|its_own|> \"a\"' --target './no such folder'", "no such folder"),
    ],
)
def test_a_model_is_refused_on_the_command_line(run, pair_options, arguments, message):
    code, out, err = run("hi", *pair_options, *shlex.split(arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


ELSEWHERE = "compile is supported only by the cpu and cuda backends"


@pytest.mark.parametrize(
    ("backend", "settings", "message"),
    [
        ("cuda", {"kv_bits": 3}, "kv_bits must be 8 on the cuda backend, got 3"),
        ("cuda", {"draft_bits": 5}, "draft_bits must be one of"),
        ("cuda", {"wired": True}, "wired is supported only by the mlx backend"),
        ("cpu", {"kv_bits": 3}, "kv_bits must be 8 on the cpu backend, got 3"),
        ("cpu", {"memory_gb": 1.0}, "memory_gb is supported only by the cuda backend"),
        ("cpu", {"device_map": "auto"}, "device_map is supported only by the cuda backend"),
        ("mlx", {"kv_bits": 3}, r"kv_bits must be one of \(4, 8\) on the mlx backend, got 3"),
        ("mlx", {"draft_bits": 7}, "draft_bits must be one of"),
        ("mlx", {"compile": True}, ELSEWHERE),
        ("reference", {"kv_bits": 8}, "kv_bits is not supported by the reference backend"),
        ("reference", {"draft_bits": 4}, "draft_bits is not supported by the reference backend"),
        ("reference", {"exact": True}, "exact is not supported by the reference backend"),
        ("reference", {"compile": True}, ELSEWHERE),
        ("reference", {"device": 0}, r"device must be the name of a device.*got 0"),
        ("reference", {"dtype": "float8"}, "unknown dtype"),
        ("abacus", {}, "unknown backend 'abacus'"),
        *((x, {"device": "tpu"}, "tpu") for x in ("reference", "cpu", "cuda", "mlx")),
    ],
)
def test_settings_are_refused_before_anything_is_fetched(backend, settings, message):
    if not installed(backend):
        pytest.skip(f"needs the framework of {backend}")
    with (
        failing(language_model, "resolve_target", AssertionError("fetched")),
        pytest.raises((ConfigError, BackendError), match=message),
    ):
        load(backend=backend, **settings)


USES = {
    "generate": ["hi"],
    "serve": ["--port", "0"],
    "evaluate": ["--prompts", "prompts.jsonl"],
    "doctor": [],
    "distill": ["--prompts", "prompts.jsonl", "--output", "answers.jsonl"],
    "train": ["--responses", "responses.jsonl", "--output", "trained"],
    "adapt": ["--prompts", "prompts.jsonl", "--validation-sequences", "2", "--output", "adapted"],
}

NEEDED = {"serve": "fastapi", "train": "torch", "adapt": "torch"}
"""Packages that commands need before they look at the target."""


@pytest.fixture
def without_vocabulary(tmp_path, monkeypatch):
    """Where a target without `tokenizer.json`, a drafter, prompts and responses are."""
    write_target(tmp_path / "target", "qwen2", seed=1)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=2)
    save_tokenizer(tmp_path / "target")
    (tmp_path / "target" / "tokenizer.json").unlink()
    prompts = [{"id": n, "prompt": f"hi {n}"} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (tmp_path / "responses.jsonl").write_text('{"prompt_ids": [5], "response_ids": [6, 7]}')
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("without_vocabulary")
@pytest.mark.parametrize("command", USES)
def test_a_target_without_a_vocabulary_is_refused_by_every_command(command, capsys):
    if find_spec(NEEDED.get(command, "numpy")) is None:
        pytest.skip(f"{command} needs {NEEDED[command]}")
    options = ["--target", "target", "--backend", "cuda" if command == "train" else "reference"]
    options += [] if command in ("distill", "train") else ["--drafter", "drafter"]
    assert main([command, *USES[command], *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: target has no usable tokenizer (its vocabulary is missing)" in err
