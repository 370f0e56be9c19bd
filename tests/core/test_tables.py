"""What follows from the options of configurations is up to date, where it is checked in."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import treeflash
from treeflash.cli.options import DECODE_OPTIONS
from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.errors import ConfigError, PromptError
from treeflash.language_model import LanguageModel, LoadOptions, load
from treeflash.option import options_of
from treeflash.text.options import OPTIONS, Options, parse_options

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
    meant = r"unknown option 'kvbits' \(did you mean kv_bits\?\); options are target,"
    with pytest.raises(ConfigError, match=meant):
        treeflash.load(kvbits=8)


DEFAULTS = {
    field.name: field.default
    for kind in (DecodeConfig, SamplingConfig)
    for field in fields(kind)
    if field.name not in ("method", "stop_token_ids", "sampling", "penalties")
}


@pytest.mark.parametrize("name", Options.__annotations__)
def test_help_lists_every_option(name):
    for listed in (Options, LanguageModel.generate, LanguageModel.stream):
        entries = re.findall(rf"^ +{name} \(.+\): .+", str(listed.__doc__), re.MULTILINE)
        assert len(entries) == 1


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_the_listed_default_is_the_real_one(name, default):
    listed = re.search(
        rf" {name} \([^)]+\): .*?Default: (.+?)\.\n", str(Options.__doc__), re.DOTALL
    )
    assert listed
    assert listed[1] == (f'"{default}"' if isinstance(default, str) else str(default))


def test_reserved_variables_of_the_chat_template_are_refused_before_a_model_is_loaded():
    parse_options({"template_args": {"enable_thinking": True, "documents": []}})
    for name in ("messages", "return_tensors"):
        with pytest.raises(PromptError, match=f"'{name}' is reserved"):
            parse_options({"template_args": {name: 1}})
