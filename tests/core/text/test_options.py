"""The list of options that `help` shows names every option with its default."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.errors import PromptError
from treeflash.language_model import LanguageModel
from treeflash.text.options import Options, parse_options

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
