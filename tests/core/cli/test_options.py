"""Options that commands share."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from treeflash import language_model
from treeflash.cli import options
from treeflash.cli.console import Parser
from treeflash.cli.options import (
    add_decode_options,
    add_model_options,
    decode_options,
    locate_model,
)
from treeflash.errors import ConfigError


@pytest.fixture
def parser() -> Parser:
    """Return a parser with all shared options."""
    parser = Parser("test", "A test.")
    add_model_options(parser)
    add_decode_options(parser)
    return parser


def test_only_given_options_are_set(parser):
    assert decode_options(parser.parse_args([])) == {}
    flags = (
        "--method ddtree --budget 8 --top-m 4 --top-k-children 5 --draft-temperature 0.5 "
        "--calibration off --max-tokens 9 --temperature 0.7 --top-k 20 --top-p 0.9 --min-p 0.1 "
        "--seed 3 --stop a --stop b --system Be"
    )
    args = [*flags.split(), "--chat-template-args", '{"enable_thinking": true}']
    assert decode_options(parser.parse_args(args)) == {
        "method": "ddtree",
        "budget": 8,
        "top_m": 4,
        "top_k_children": 5,
        "draft_temperature": 0.5,
        "calibration": False,
        "max_tokens": 9,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 3,
        "stop": ["a", "b"],
        "system": "Be",
        "template_args": {"enable_thinking": True},
    }
    assert decode_options(parser.parse_args(["--raw"])) == {"raw": True}
    with pytest.raises(ConfigError, match="a raw prompt does not use the chat template"):
        decode_options(parser.parse_args([*args, "--raw"]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--budget", "x"], "--budget"),
        (["--budget"], "--budget"),
        (["--method", "magic"], "magic"),
        (["--dtype", "int8"], "int8"),
        (["--bud", "8"], "--bud"),
        (["--chat-template-args", "{"], "invalid JSON"),
        (["--chat-template-args", "[" * 100000], "invalid JSON"),
        (["--chat-template-args", "[1]"], "must be a JSON object"),
        (["--calibration", "maybe"], "must be on or off, got maybe"),
        (["--stop="], "stop"),
    ],
)
def test_arguments_that_are_no_values_are_configuration_errors(parser, args, message):
    with pytest.raises(ConfigError, match=message):
        decode_options(parser.parse_args(args))


@pytest.mark.parametrize(
    ("args", "methods", "drafter"),
    [
        ([], [], None),
        ([], ["ar"], False),
        ([], ["ar", "ddtree"], None),
        (["--drafter", "d"], ["ar"], "d"),
        (["--drafter", "d"], [], "d"),
    ],
)
def test_plain_decoding_loads_no_drafter_by_default(parser, monkeypatch, args, methods, drafter):
    calls = []

    def keep(*args, **kwargs):
        calls.append((args, kwargs))

    monkeypatch.setattr(language_model, "locate", keep)
    given = ["--target", "t", "--backend", "mlx", "--device", "gpu", "--kv-bits", "8"]
    locate_model(parser.parse_args([*args, *given]), methods)
    keywords = {
        "backend": "mlx",
        "device": "gpu",
        "dtype": None,
        "device_map": None,
        "bits": None,
        "draft_bits": None,
        "draft_window": None,
        "memory_gb": None,
        "kv_bits": 8,
        "adapter": None,
        "images": True,
        "exact": None,
        "force": False,
        "threads": None,
    }
    assert calls == [
        (("t", drafter), keywords | {"cuda_graphs": True, "compile": False, "wired": False})
    ]


def test_a_spinner_says_what_is_being_loaded(monkeypatch):
    shown = []
    monkeypatch.setattr(
        options.Console, "status", lambda self, text: (shown.append(text), nullcontext())[1]
    )
    target = Path("/hub/models--Qwen--Qwen3-4B/snapshots/0a1b")
    pair = SimpleNamespace(target=target, load=lambda: list(shown))
    monkeypatch.setattr(language_model, "locate", lambda *args, **settings: pair)
    args = argparse.Namespace(target="Qwen/Qwen3-4B", drafter=None, backend=None)
    assert options.load_model(args) == ["loading Qwen/Qwen3-4B"]


def test_help_names_the_defaults(parser):
    text = " ".join(parser.format_help().split())
    for default in ("(default: auto)", "(default: 16)", "(default: 256)", "SmolLM2-135M-Instruct"):
        assert default in text


def test_help_exits_with_0(parser):
    assert isinstance(parser, argparse.ArgumentParser)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0
