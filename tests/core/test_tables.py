"""What follows from the options of configurations and is checked in is up to date."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import treeflash
from treeflash.cli.options import DECODE_OPTIONS
from treeflash.config import LoadConfig
from treeflash.errors import ConfigError
from treeflash.language_model import LanguageModel, LoadOptions, load
from treeflash.option import options_of
from treeflash.text.options import OPTIONS, Options

ROOT = Path(__file__).parents[2]


def test_the_command_would_change_nothing():
    run = "from tests.tables import PARTS, ROOT, write\n"
    run += "print([p for p in PARTS if write(p) != (ROOT / p).read_text(encoding='utf-8')])"
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n", "run python -m tests.tables"


def test_keywords_are_the_options():
    assert list(Options.__annotations__) == list(OPTIONS)
    assert list(LoadOptions.__annotations__) == list(options_of(LoadConfig))
    assert set(OPTIONS) - set(DECODE_OPTIONS) == {"stop_token_ids"}


def test_signatures_and_docstrings_name_the_keywords():
    for function, options in ((load, options_of(LoadConfig)), (LanguageModel.stream, OPTIONS)):
        assert list(options) == list(inspect.signature(function).parameters)[-len(options) :]
        for name, option in options.items():
            assert f"\n    {name} (" in str(function.__doc__)
            assert option.help


def test_an_unknown_setting_of_load_is_named():
    with pytest.raises(ConfigError, match="unknown option 'kvbits'; options are device, dtype"):
        treeflash.load(kvbits=8)
