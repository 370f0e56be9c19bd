"""Options of commands from TOML files, and their priority."""

from __future__ import annotations

from pathlib import Path

import pytest

from treeflash.cli.console import Parser
from treeflash.commands import distill, doctor, evaluate, generate, train
from treeflash.errors import ConfigError, PromptError

REQUIRED = {
    train: 'responses = ["a.jsonl", "b.jsonl"]\noutput = "o"\nvalidation = ["v"]\ndevice = "cpu"',
    distill: 'prompts = ["a.jsonl"]\noutput = "o"\ntemperature = [0, 0.5]\ndevice = "cpu"',
    evaluate: 'prompts = ["a.jsonl"]\nmethods = "ar"\ndevice = "cpu"',
    generate: 'prompts = "a.jsonl"\noutput = "o"\nstop = ["x", "--y"]\ndevice = "cpu"',
    doctor: 'prompts = "a.jsonl"\ndrafter = "d"\ndevice = "cpu"',
}
"""Files with all of the options that a command requires, and some others."""


@pytest.fixture
def parser() -> Parser:
    parser = Parser("test", "A test.")
    parser.add_config_option()
    parser.add_argument("--size", type=int)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--stop", action="append")
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--path", type=Path, required=True)
    return parser


@pytest.fixture
def parse(parser, tmp_path):
    """Parse a file and some arguments."""

    def parse(text: str, *arguments: str):
        file = tmp_path / "options.toml"
        file.write_text(text, encoding="utf-8-sig")  # with a byte order mark
        return parser.parse([f"--config={file}", *arguments])

    return parse


def test_a_file_gives_all_kinds_of_options(parse):
    text = 'size = 3\nnames = ["a", "b"]\nstop = ["x", "--y"]\nraw = true\npath = "p"'
    args = parse(text)
    assert (args.size, args.names, args.stop, args.raw) == (3, ["a", "b"], ["x", "--y"], True)
    assert args.path == Path("p")


def test_the_command_line_has_priority(parse):
    args = parse('size = 3\nraw = false\npath = "p"', "--size", "4", "--path=q")
    assert (args.size, args.raw, args.path) == (4, False, Path("q"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size =", "is not a valid TOML file"),
        ("sise = 3", "unknown option 'sise'"),
        ("siz = 3", "unknown option 'siz'"),
        ('size = "x"', "size cannot be \"x\": argument --size: invalid int value: 'x'"),
        ("size = true", "size must be a number, not true"),
        ("size = [1, 2]", r"size must be a single value, not \[1, 2\]"),
        ("raw = 1", "raw must be true or false, not 1"),
        ('config = "other.toml"', "cannot set config"),
        ("help = true", "cannot set help"),
        ("size = 3", "the following arguments are required: --path"),
    ],
)
def test_an_error_names_the_file_and_the_option(parse, text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_a_missing_file_is_named(parser):
    with pytest.raises(PromptError, match=r"no\.toml cannot be read"):
        parser.parse(["--config", "no.toml"])


@pytest.mark.parametrize("command", REQUIRED, ids=lambda command: command.__name__)
def test_commands_take_all_options_from_a_file(command, tmp_path):
    file = tmp_path / "options.toml"
    file.write_text('target = "t"\n' + REQUIRED[command])
    args = command.make_parser().parse(["--config", str(file)])
    assert (args.target, args.device) == ("t", "cpu")
