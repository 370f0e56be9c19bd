"""Options of commands: those that they share, files of options, and how commands end."""

import shutil
import warnings
from pathlib import Path

import pytest
from failures import failing
from recordings import recording

from treeflash import language_model
from treeflash.cli import options
from treeflash.cli.console import Parser, guarded
from treeflash.cli.options import (
    add_decode_options,
    add_model_options,
    decode_options,
    locate_model,
)
from treeflash.commands import distill, doctor, evaluate, generate, train
from treeflash.errors import CheckpointError, ConfigError, PromptError


@pytest.fixture
def shared_parser() -> Parser:
    """Return a shared_parser with all shared options."""
    shared_parser = Parser("test", "A test.")
    add_model_options(shared_parser)
    add_decode_options(shared_parser)
    return shared_parser


def test_only_given_options_are_set(shared_parser):
    assert decode_options(shared_parser.parse_args([])) == {}
    flags = (
        "--method ddtree --budget 8 --top-m 4 --top-k-children 5 --draft-temperature 0.5 "
        "--calibration off --max-tokens 9 --temperature 0.7 --top-k 20 --top-p 0.9 --min-p 0.1 "
        "--seed 3 --stop a --stop b --system Be"
    )
    args = [*flags.split(), "--chat-template-args", '{"enable_thinking": true}']
    assert decode_options(shared_parser.parse_args(args)) == {
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
    assert decode_options(shared_parser.parse_args(["--raw"])) == {"raw": True}
    with pytest.raises(ConfigError, match="a raw prompt does not use the chat template"):
        decode_options(shared_parser.parse_args([*args, "--raw"]))


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
def test_plain_decoding_loads_no_drafter_by_default(
    shared_parser, monkeypatch, args, methods, drafter
):
    calls = []

    def keep(*args, **kwargs):
        calls.append((args, kwargs))

    monkeypatch.setattr(language_model, "locate", keep)
    given = ["--target", "t", "--backend", "mlx", "--device", "gpu", "--kv-bits", "8"]
    locate_model(shared_parser.parse_args([*args, *given]), methods)
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


def test_a_spinner_says_what_is_being_loaded(shared_parser, tiny_pair, tmp_path):
    folder = shutil.copytree(tiny_pair[0], tmp_path / "models--Qwen--Qwen3-4B/snapshots/0a1b")
    args = shared_parser.parse_args(["--backend", "reference", "--target", str(folder)])
    with (
        recording(options.Console, "status") as shown,
        failing(language_model.LocatedPair, "load", ConfigError("loaded")),
        pytest.raises(ConfigError, match="loaded"),
    ):
        options.load_model(args, ["ar"])
    assert [str(text) for _, text in shown] == ["loading Qwen/Qwen3-4B"]


def test_help_names_the_defaults(shared_parser):
    text = " ".join(shared_parser.format_help().split())
    for default in ("(default: auto)", "(default: 16)", "(default: 256)", "SmolLM2-135M-Instruct"):
        assert default in text


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
        ("siz = 3", r"unknown option 'siz' \(did you mean size\?\); see --help"),
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


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CheckpointError("x is\n  damaged"), 2, "error: x is damaged"),
        (OSError(28, "No space left", "out"), 2, "error: out: No space left"),
        (OSError(28, "No space left"), 2, "error: the output cannot be written: No space left"),
        (MemoryError(), 2, "error: out of memory; try shorter texts"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "error: out of memory; try shorter texts"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            2,
            "error: out of memory; try shorter texts, smaller draft trees (--budget)",
        ),
        (
            RuntimeError("[malloc] Unable to allocate 99 bytes."),
            2,
            "error: out of memory; try shorter texts",
        ),
        (
            RuntimeError(
                "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
                "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
            ),
            1,
            "error: the GPU refuses further work of this process; start again",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_one_line_and_a_code(capsys, error, code, line):
    @guarded
    def main(argv=None):
        raise error

    assert main([]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [IndexError, RuntimeError])
def test_other_exceptions_are_not_caught(error):
    @guarded
    def main(argv=None):
        raise error

    with pytest.raises(error):
        main([])


def test_warnings_are_notes_of_one_line():
    """Another package's warnings of other kinds keep their place."""
    shown = []

    @guarded
    def main(argv=None):
        for kind in (UserWarning, FutureWarning):
            shown.append(warnings.formatwarning("models are large", kind, "file.py", 7, ""))
        return 0

    plain = warnings.formatwarning
    assert main([]) == 0
    assert shown == ["note: models are large\n", "file.py:7: FutureWarning: models are large\n"]
    assert warnings.formatwarning is plain
