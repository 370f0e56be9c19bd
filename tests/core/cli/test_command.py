"""The command `treeflash` and its subcommands, and the defaults that their help shows."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest

from treeflash.command import COMMANDS, SHELLS, main
from treeflash.commands import adapt, evaluate
from treeflash.config import DecodeConfig
from treeflash.language_model import LanguageModel
from treeflash.testing.models import write_drafter, write_target
from treeflash.text.options import parse_options
from treeflash.text.prompt import EncodedPrompt
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import DistillConfig

LIGHT = 12
"""Modules of this package that `treeflash --help` may import."""

HEAVY = {"numpy", "transformers", "tokenizers", "huggingface_hub", "jinja2", "prompt_toolkit"}


def imported_by(arguments):
    """The modules that a fresh interpreter has imported after a command line."""
    code = f"""
import json, sys
from treeflash.__main__ import main
try:
    main({arguments})
except SystemExit:
    pass
print()
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_the_command_itself_imports_nothing_heavy(arguments):
    modules = imported_by(arguments)
    assert not HEAVY & modules
    assert sum(name.split(".")[0] == "treeflash" for name in modules) <= LIGHT


def test_the_help_of_generate_imports_nothing_heavy():
    assert not HEAVY & imported_by(["generate", "--help"])


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "treeflash", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"treeflash {version('treeflash')}\n"


def test_help_lists_the_commands(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"usage: treeflash {name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_tells_the_version(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--version"])
    assert capsys.readouterr() == (f"treeflash {version('treeflash')}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "invalid choice: 'generat'"),
        (["--verison"], "unrecognized arguments: --verison"),
        (["models", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts_know_commands_and_options(shell, capsys):
    assert main(["--completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "max-tokens" in script


def test_bash_completes_the_options_of_a_command(tmp_path, capsys):
    main(["--completion", "bash"])
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    code = f"""
source {script}
COMP_WORDS=(treeflash train --val) COMP_CWORD=2
_shtab_treeflash treeflash --val train
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert {"--validation", "--validate-every"} <= set(done.stdout.split())


SHOWN = re.compile(r"\(default: ([^()]*(?:\([^()]*\)[^()]*)*)\)")

REQUIRED = {"evaluate": ["--prompts", "p"], "adapt": ["--prompts", "p", "--output", "o"]}


def actions(command: str) -> list[argparse.Action]:
    """The options of a command with a help text."""
    parser = import_module(f"treeflash.commands.{command}").make_parser()
    return [action for action in parser.actions if action.help not in (None, argparse.SUPPRESS)]


def shown(command: str) -> dict[str, str]:
    """The defaults that the help of a command shows, by option."""
    found = {action.dest: SHOWN.findall(str(action.help)) for action in actions(command)}
    assert all(len(texts) <= 1 for texts in found.values()), found
    return {name: texts[0] for name, texts in found.items() if texts}


def as_shown(value: Any) -> str:
    """A value as the help shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("command", COMMANDS)
def test_values_of_the_parser_are_shown(command):
    texts = shown(command)
    for action in actions(command):
        default = action.default
        if default in (None, argparse.SUPPRESS, False, True) or not action.option_strings:
            continue
        if default == [] or action.dest == "explain":  # whose help says what happens without it
            continue
        assert texts.get(action.dest, "").startswith(str(default)), action.dest


def check(command: str, used: Mapping[str, Any]) -> None:
    """Compare what the help shows with what is used; there must be something to compare."""
    texts = shown(command)
    # Without a value, the help says in words what happens; the best method depends on the pair.
    compared = [name for name in texts if used.get(name) is not None and name != "method"]
    assert len(compared) > 3
    for name in compared:
        assert texts[name] == as_shown(used[name]), name


def decoding(config: DecodeConfig) -> dict[str, Any]:
    """The settings of a configuration, by the names of the options."""
    penalties = {f"{name}_penalty": value for name, value in vars(config.penalties).items()}
    return vars(config) | vars(config.sampling) | penalties


def test_generate():
    config = decoding(DecodeConfig())
    assert shown("generate")["seed"] == "random, or 0 with --prompts"
    check("generate", config | {"seed": "random, or 0 with --prompts"})


def test_evaluate():
    args = evaluate.make_parser().parse(REQUIRED["evaluate"])
    for options in evaluate.case_options(args).values():
        check("evaluate", decoding(parse_options(options).decode))


def test_chat(use, scripted, run_chat):
    use(scripted("hi"))
    conversation = run_chat()
    assert [conversation.markdown, run_chat("--no-markdown").markdown] == [True, False]
    assert "seed" not in conversation.options  # a random one for each answer
    check("chat", decoding(parse_options(conversation.options).decode) | {"seed": "random"})


def test_serve(scripted):
    service = pytest.importorskip("treeflash.serving.service")
    from treeflash.serving.settings import Settings

    model: LanguageModel = scripted("hi")
    engine = SimpleNamespace(
        model=model,
        settings=Settings(),
        check_count=lambda answers: None,
        shorten=lambda prompt_ids, config: config,
        submit=lambda answers, **_: answers,
    )
    http: Any = SimpleNamespace(state=SimpleNamespace(cache_salt=None))
    offered = service.Service(engine, {}, "model", nullcontext)
    configs = [offered.start(http, {}, [EncodedPrompt([1])])[0].config for _ in range(2)]
    assert configs[0].sampling.seed != configs[1].sampling.seed
    used = decoding(configs[0]) | {"seed": "random"} | vars(Settings())
    check("serve", used)


@pytest.mark.parametrize("command", COMMANDS)
def test_sizes_have_the_unit_that_the_code_counts(command):
    """Limits of memory and of states are multiples of 2^30 or 2^20, files of features of 10^9."""
    for action in actions(command):
        if action.dest == "cache_gb":
            assert re.search(r"\bGB of disk space", str(action.help))
        elif unit := {"gb": "GiB", "mb": "MiB"}.get(action.dest.rpartition("_")[2]):
            assert action.metavar == unit
            assert not re.search(r"\b[GM]B\b", str(action.help)), action.help


def test_distill():
    check("distill", vars(DistillConfig()))


def test_train():
    config = TrainConfig()
    assert (config.patience, config.minutes) == (None, None)
    texts = shown("train")
    for name in ("block_size", "head"):
        used = str(getattr(config, name))
        assert texts[name] == f"{used}, or that of the drafter in `init`"
    check("train", {k: v for k, v in vars(config).items() if k not in ("block_size", "head")})


def test_adapt(tmp_path):
    write_target(tmp_path / "target", "llama", seed=1)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=2)
    args = adapt.make_parser().parse(REQUIRED["adapt"])
    config = adapt.train_config(args, tmp_path / "drafter", DistillConfig())
    assert (config.head, config.freeze_backbone) == ("swiglu", False)  # as in this drafter
    used = vars(config) | {"head": None, "freeze_backbone": None}
    check("adapt", used | vars(DistillConfig()) | {"measured": adapt.MEASURED})
