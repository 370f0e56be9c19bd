"""The options of the command, as its documentation and its help name them; its end."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from servers import Gate, serving, wait_until

from treeflash import serve as command
from treeflash.errors import ConfigError
from treeflash.serving import application
from treeflash.serving.settings import LIMITS, Settings

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture
def told(monkeypatch):
    """What the command would serve."""
    found = {}

    def serve(load, settings, defaults, names, **where):
        found.update(where, settings=settings, defaults=defaults, names=names)
        return 0

    monkeypatch.setattr(application, "serve", serve)
    return found


def documented():
    """The flags of the table of options, and their defaults."""
    rows = re.findall(
        r"^\| (`--[^|]*) \| ([^|]*) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    found = {}
    for flags, defaults in rows:
        names = re.findall(r"--[\w-]+", flags)
        values = [value.strip() for value in defaults.split(",")]
        found |= dict(zip(names, values if len(values) == len(names) else values * 2, strict=False))
    return found


COMPUTED = {
    "--max-memory-gb": "4; on a Mac the memory that the models leave free",
    "--prefix-cache-gb": "half of `--max-memory-gb`",
}
"""Defaults that depend on the machine or on another option."""


def test_the_documented_defaults_are_those_of_the_command(told):
    assert command.main([]) == 0
    table = documented()
    flags = {f"--{limit.name.replace('_', '-')}": limit.name for limit in LIMITS}
    assert flags.keys() <= table.keys()
    for flag, name in flags.items():
        default = getattr(told["settings"], name)
        if default is None:  # `test_engine.py` has the values
            assert table[flag] == COMPUTED[flag]
        else:
            assert float(table[flag]) == default, flag
    assert (table["--host"], int(table["--port"])) == (told["host"], told["port"])
    assert told["settings"].api_keys == told["settings"].cors_origins == ()


def test_the_help_has_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in documented():
        assert flag in text
    for limit in LIMITS:
        default = "" if limit.default is None else f" (default: {limit.default})"
        assert f"{limit.metadata['help']}{default}" in text
        assert "(default: " in limit.metadata["help"] + default


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.name)
def test_every_limit_can_be_set(told, limit):
    assert command.main([f"--{limit.name.replace('_', '-')}", "7"]) == 0
    assert told["settings"] == Settings(**{limit.name: 7})


@pytest.mark.parametrize("name", ["api_keys", "cors_origins"])
def test_keys_and_origins_are_lists_without_empty_texts(name):
    """A file of Ray may have a text instead; and a request without a key has the empty one."""
    for wrong in ("secret", "", ("secret", ""), ("",)):
        with pytest.raises(ConfigError, match=f"{name} must be a list"):
            Settings(**{name: wrong})
    assert Settings(**{name: ["one", "two"]})


def test_the_model_has_all_of_its_names(model):
    """Requests may use any of them; responses have the first."""
    from treeflash.serving.engine import Engine
    from treeflash.serving.metrics import Metrics
    from treeflash.serving.service import Service

    engine = Engine(lambda: model, Settings(), Metrics())
    service = Service(engine, Settings(), {}, ("first", "second"))
    for name in ("first", "second", None):
        service.check_model(name)
    with pytest.raises(Exception, match="this server has first, second"):
        service.check_model("third")


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
    engine = SimpleNamespace(draining=draining, unfinished=unfinished, device_lost=lost)
    server = application.Server(uvicorn.Config("nothing:app", log_config=None), engine)
    assert asyncio.run(server.on_tick(1)) == ends
    assert server.force_exit == lost


def test_a_second_signal_ends_the_server_at_once(model):
    with serving(model) as server:
        with Gate(server.engine) as gate:
            body = {"prompt": "A", "stream": True, "max_tokens": 300, "ignore_eos": True}
            with server.client.stream("POST", "/v1/completions", json=body):
                gate.allow(1)
                server.server.handle_exit(15, None)
                assert not server.server.should_exit, "the answer is running"
                server.server.handle_exit(15, None)
                assert server.server.should_exit
                assert server.server.force_exit
        wait_until(lambda: server.engine.unfinished == 0)
