"""The command `treeflash` and its subcommands."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from treeflash.command import COMMANDS, SHELLS, main

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
