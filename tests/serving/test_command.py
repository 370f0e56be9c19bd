"""`treeflash serve`: options, configuration files, errors, and a whole life."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from failures import failing
from processes import core_command
from servers import PATIENCE, parse, wait_until
from stand_ins import stand_in

from treeflash.commands import serve as command
from treeflash.errors import ConfigError
from treeflash.option import options_of
from treeflash.serving import application as serving_run
from treeflash.serving.settings import Settings

LIMITS = tuple(field for field in fields(Settings) if field.metadata)


@pytest.fixture
def run(capsys):
    """Run the command: exit status, standard error."""

    def run(*args: object) -> tuple[int, str]:
        code = command.main([str(arg) for arg in args])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def told(monkeypatch):
    """What the command would serve."""
    found = {}

    def serve(specs, settings, **where):
        first = specs[0]
        found.update(where, specs=specs, settings=settings)
        found.update(load=first.load, defaults=first.defaults, names=first.names)
        return 0

    stand_in(monkeypatch, serving_run, serve=serve)
    return found


@pytest.fixture
def located(monkeypatch):
    """The models that are looked for on this machine; nothing is fetched."""
    found = []

    def locate(args, methods):
        found.append((args.target, args.drafter, methods))
        config = SimpleNamespace(images=True)
        return SimpleNamespace(target=Path(args.target), config=config, load=lambda: args.target)

    stand_in(monkeypatch, command.cli, locate_model=locate)
    return found


def write(path, text):
    path.write_text(text)
    return path


def test_defaults(run, told):
    assert run() == (0, "")
    assert (told["host"], told["port"]) == ("127.0.0.1", 8000)
    assert told["settings"] == serving_run.Settings()
    assert told["settings"].api_keys == told["settings"].cors_origins == ()
    assert told["defaults"] == {}
    assert told["names"] == ("SmolLM2-135M-Instruct",)


def test_options(run, told, tmp_path):
    keys = write(tmp_path / "keys", "one\n\n two \n")
    args = "--temperature 0.7 --budget 16 --max-parallel 3 --prefix-cache-gb 0 --timeout 9.5"
    args += " --tool-call-parser llama3_json"
    args += " --cors-origin https://a.example --cors-origin https://b.example --port 0"
    assert run(*args.split(), "--api-key-file", keys, "--target", "Qwen/Qwen3-4B") == (0, "")
    settings = told["settings"]
    assert told["defaults"] == {"temperature": 0.7, "budget": 16}
    assert (settings.max_parallel, settings.prefix_cache_gb, settings.timeout) == (3, 0, 9.5)
    assert settings.api_keys == ("one", "two")
    assert settings.tool_call_parser == "llama3_json"
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert told["names"] == ("Qwen/Qwen3-4B",)


def test_configuration_file(run, told, tmp_path):
    file = write(
        tmp_path / "serve.toml",
        """
        port = 9000
        max_parallel = 4
        no-cuda-graphs = true
        wired = false
        stop = ["END", "--x"]
        model_name = ["a", "b"]
        temperature = 0.5
        [chat_template_args]
        enable_thinking = true
        """,
    )
    assert run("--config", file, "--port", 9001) == (0, "")
    assert told["port"] == 9001
    assert told["settings"].max_parallel == 4
    assert told["names"] == ("a", "b")
    assert told["defaults"] == {
        "temperature": 0.5,
        "stop": ["END", "--x"],
        "template_args": {"enable_thinking": True},
    }


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--port", "70000"], "must be a port from 0 to 65535, got 70000"),
        (["--port", "-1"], "must be a port"),
        (["--max-parallel", "0"], "max_parallel must be 1 or more"),
        (["--max-memory-gb", "-1"], "max_memory_gb must be above 0"),
        (["--max-memory-gb", "nan"], "max_memory_gb must be above 0"),
        (["--prefix-cache-gb", "-1"], "prefix_cache_gb must be 0 or more"),
        (["--max-queue", "x"], "invalid int value: 'x'"),
        (["--timeout", "0"], "timeout must be above 0"),
        (["--timeout", "inf"], "timeout must be above 0, got inf"),
        (["--port", "65536"], "must be a port from 0 to 65535, got 65536"),
        (["--max-queue", "-1"], "max_queue must be 0 or more"),
        (["--max-choices", "0"], "max_choices must be 1 or more"),
        (["--max-body-mb", "0"], "max_body_mb must be above 0"),
        (["--body-timeout", "0"], "body_timeout must be above 0"),
        (["--keep-alive", "0"], "keep_alive must be above 0"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--raw"], "unrecognized arguments: --raw"),
        (["--api-key-file", "/no/such/file"], "/no/such/file cannot be read"),
        (["--config", "/no/such/file"], "/no/such/file"),
        (["--config"], "expected one argument"),
        (["--host", "no.such.host.example"], "cannot listen on no.such.host.example:8000"),
        (["--host", "no..host"], "cannot listen on no..host:8000 (it is not a name of a host)"),
        (["--target", "/no/such/folder", "--port", "0"], "/no/such/folder"),
        (["--nothing"], "--nothing"),
        (["Hello"], "Hello"),
        (["--models", "x.toml", "--target", "a"], "--target is set by the file of --models"),
        (["--models", "x.toml", "--drafter", "a"], "--drafter is set by the file of --models"),
        (["--target", "a", "--target", "b", "--drafter", "c"], "--drafter would be for all of"),
        (["--target", "a", "--target", "b", "--model-name", "c"], "--model-name would be for all"),
        (["--models", "/no/such/file"], "/no/such/file"),
    ],
)
def test_bad_options(run, args, says):
    code, err = run(*args)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


FILES = {
    "--config": [
        ("port = ", "is not a valid TOML file"),
        ("port = 'x'", "must be a port from 0 to 65535, got x"),
    ],
    "--models": [
        ("", "must have a table [[model]] for each model, and no more"),
        ("model = 1", "must have a table [[model]]"),
        ("model = []", "must have a table [[model]]"),
        ("model = [1]", "must have a table [[model]]"),
        ("[[model]]\n[other]", "must have a table [[model]]"),
        ("[[model]]\ncolour = 1", "unknown option 'colour'"),
        ("[[model]]\nport = 1", "cannot set port; remove it from the file"),
        ("[[model]]\nmax_models = 1", "cannot set max_models"),
        ("[[model]]\nmodels = 'x'", "cannot set models"),
        ("[[model]]\nmax_parallel = 'x'", "max_parallel cannot be"),
        ("[[model]]\ntarget = ['a', 'b']", "a model has one target, not 2"),
        ("[[model]]\nmax_parallel = 0", "max_parallel must be 1 or more"),
        ("[[model", "is not a valid TOML file"),
    ],
    "--api-key-file": [("\n \n", "has no API key")],
}


@pytest.mark.parametrize(
    ("flag", "text", "says"), [(flag, *case) for flag, cases in FILES.items() for case in cases]
)
def test_bad_files(run, located, tmp_path, flag, text, says):
    code, err = run(flag, write(tmp_path / "serve.toml", text))
    assert (code, err.count("\n")) == (2, 1)
    assert says in err
    assert flag != "--config" or "serve.toml" in err


def test_files_may_begin_with_a_byte_order_mark(run, told, tmp_path):
    keys = write(tmp_path / "keys", "\ufeffone\n")
    file = write(tmp_path / "serve.toml", f"\ufeffport = 0\napi_key_file = '{keys}'\n")
    assert run("--config", file) == (0, "")
    assert (told["port"], told["settings"].api_keys) == (0, ("one",))


@pytest.mark.parametrize(
    ("variable", "says"),
    [("messages = 1", "'messages' is reserved"), ("style = 1", "arguments: no style")],
)
def test_template_variables_that_the_chat_template_rejects(run, model, tmp_path, variable, says):
    target = shutil.copytree(model.folder, tmp_path / "target")
    template = "{% if style is defined %}{{ raise_exception('no style') }}{% endif %}"
    config = json.loads((target / "tokenizer_config.json").read_text())
    write(target / "tokenizer_config.json", json.dumps(config | {"chat_template": template}))
    file = write(tmp_path / "serve.toml", f"[chat_template_args]\n{variable}\n")
    models = ("--backend", "reference", "--target", target, "--method", "ar", "--port", 0)
    code, err = run("--config", file, *models)
    assert (code, err.count("\n")) == (2, 1)
    assert says in err


def test_without_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    message = "the server needs fastapi; pip install '.[serve]' in a clone of treeflash"
    assert run() == (2, f"error: {message}\n")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_port_taken(run):
    """No socket is left open."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err = run("--port", port)
    assert code == 2
    assert err == (
        f"error: cannot listen on 127.0.0.1:{port} (Address already in use); choose another "
        "--host or --port\n"
    )


LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+: ")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_life(model, tmp_path):
    """Of two models the one that is named is loaded, and a signal lets its answer end."""
    tables = [f'[[model]]\nname = "{x}"\ntarget = "{model.folder}"\n' for x in ("first", "second")]
    file = write(tmp_path / "models.toml", "".join(tables))
    body = {"model": "second", "prompt": "A", "max_tokens": 150, "ignore_eos": True, "stream": True}
    options = ("--models", str(file), "--backend", "reference", "--method", "ar", "--port", "0")
    log, environment = tmp_path / "log", {**os.environ, "TREEFLASH_CACHE": str(tmp_path)}
    with (
        log.open("w") as err,
        subprocess.Popen(core_command("serve", *options), stderr=err, env=environment) as process,
    ):
        try:
            wait_until(lambda: " on http://" in log.read_text() or process.poll() is not None)
            url = f"{log.read_text().split(' on ')[1].split()[0]}/v1/completions"
            with httpx.stream("POST", url, json=body, timeout=PATIENCE) as response:
                frames = parse(response)
                first = next(frames)
                process.send_signal(signal.SIGTERM)
                frames = [first, *frames]
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    text = "".join(frame["choices"][0]["text"] for frame in frames)
    assert text == model.generate("A", raw=True, max_tokens=150, stop_token_ids=()).text
    assert frames[-1]["choices"][0]["finish_reason"] == "length"
    assert {frame["model"] for frame in frames} == {"second"}
    lines = log.read_text().splitlines()
    assert all(map(LINE.match, lines))
    assert " serving first, second on http://" in lines[0]
    assert "second loaded in" in log.read_text()
    assert "first loaded in" not in log.read_text()


def test_a_disk_that_is_full_while_models_are_fetched(run):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")
    with failing(command.cli, "locate_model", full):
        code, err = run("--port", 0)
    assert (code, err) == (2, "error: model.safetensors: No space left on device\n")


PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_help_has_every_option_with_its_default(capsys):
    """So has the page; `test_tables.py` checks its table of limits."""
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    page = PAGE.read_text(encoding="utf-8")
    assert "| `--host`, `--port` | 127.0.0.1, 8000 |" in page
    for flag in re.findall(r"^\| `(--[\w-]+)", page, re.MULTILINE):
        assert flag in text
    for limit in LIMITS:
        default = limit.metadata["shown"] if limit.default is None else limit.default
        assert f"{limit.metadata['help']} (default: {default})" in text


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.name)
def test_every_limit_can_be_set(told, limit):
    assert command.main([f"--{limit.name.replace('_', '-')}", "7"]) == 0
    value = "7" if str in options_of(Settings)[limit.name].kinds else 7
    assert told["settings"] == Settings(**{limit.name: value})


@pytest.mark.parametrize("name", ["api_keys", "cors_origins"])
def test_keys_and_origins_are_lists_without_empty_texts(name):
    """A file of Ray may have a text instead; and a request without a key has the empty one."""
    for wrong in ("secret", "", ("secret", ""), ("",)):
        with pytest.raises(ConfigError, match=f"{name} must be a list"):
            Settings(**{name: wrong})
    assert Settings(**{name: ["one", "two"]})


MODELS = """
[[model]]
name = "small"
target = "a"
max_parallel = 2
unload_after = 60
temperature = 0.5

[[model]]
name = ["large", "big"]
target = "b"
drafter = "c"
[model.chat_template_args]
enable_thinking = true
"""


def test_two_models_of_one_name(run, located):
    code, err = run("--target", "a/x", "--target", "A/X", "--port", "0")
    assert (code, err.count("\n")) == (2, 1)
    assert "two models have the name A/X" in err


def test_models_of_a_file(run, told, located, tmp_path):
    """Each has the options of its table, and those of the command line that it leaves out."""
    file = write(tmp_path / "models.toml", MODELS)
    args = ("--max-parallel", 4, "--max-models", 1, "--port", 0, "--method", "ar")
    assert run("--models", file, *args) == (0, "")
    assert located == [("a", None, ["ar"]), ("b", "c", ["ar"])]
    small, large = told["specs"]
    assert (small.names, large.names) == (("small",), ("large", "big"))
    assert [x.settings.max_parallel for x in told["specs"]] == [2, 4]
    assert [x.settings.unload_after for x in told["specs"]] == [60, None]
    assert small.defaults == {"method": "ar", "temperature": 0.5}
    assert large.defaults == {"method": "ar", "template_args": {"enable_thinking": True}}
    assert (small.load(), large.load()) == ("a", "b")
    assert (small.folder, large.folder) == (Path("a"), Path("b"))
    assert (told["settings"].max_models, told["port"]) == (1, 0)


def test_several_targets(run, told, located):
    assert run("--target", "a/b", "--target", "c", "--temperature", 0.5) == (0, "")
    assert [(x.names, x.defaults) for x in told["specs"]] == [
        (("a/b",), {"temperature": 0.5}),
        (("c",), {"temperature": 0.5}),
    ]
    assert [target for target, *_ in located] == ["a/b", "c"]


def test_a_model_is_called_as_its_file_or_folder(tmp_path):
    (tmp_path / "Qwen3-4B-Q4_K_M.gguf").touch()
    for target, name in (
        (tmp_path, tmp_path.name),
        (tmp_path / "Qwen3-4B-Q4_K_M.gguf", "Qwen3-4B-Q4_K_M"),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
    ):
        args = command.make_parser().parse(["--target", str(target)])
        (one,) = command.model_arguments(args, [])
        assert command.model_names(one) == (name,)


@pytest.mark.parametrize(
    ("draining", "unfinished", "lost", "ends"),
    [
        (False, 0, False, False),
        (False, 3, False, False),
        (True, 3, False, False),
        (True, 0, False, True),
        (False, 3, True, True),
    ],
)
def test_when_the_server_ends(draining, unfinished, lost, ends):
    """After the running answers, or when the device is lost, whatever is unfinished."""
    pool = SimpleNamespace(
        draining=draining, unfinished=unfinished, device_lost=lost, end_waiting=lambda: None
    )
    server = serving_run.Server(uvicorn.Config("nothing:app", log_config=None), pool)
    assert asyncio.run(server.on_tick(1)) == ends
    assert server.force_exit == lost
