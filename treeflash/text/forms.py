"""The form that options ask of a text, as a grammar, which is checked before a model is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from treeflash.errors import ConfigError
from treeflash.text.options import TextConfig

if TYPE_CHECKING:
    from treeflash.text.grammar import Grammar

BYTES = {"tokenizer": "byte"}
"""A vocabulary that decides about every grammar but those with special tokens of a model."""
OF_A_MODEL = "unknown special token"
"""What llguidance says of special tokens that a vocabulary lacks."""


def form_of(config: TextConfig) -> Grammar | None:
    """Return the grammar of the form that a text must have, None if it may have any.

    Raises a ConfigError if llguidance is not installed.
    """
    if not config.has_form:
        return None
    if find_spec("llguidance") is None:
        raise ConfigError("json_schema, regex or grammar needs llguidance; pip install llguidance")
    from treeflash.text.grammar import Grammar

    if config.json_schema is not None:
        return Grammar.json(config.json_schema)
    if config.regex is not None:
        return Grammar.regex(config.regex)
    return Grammar.lark_or_gbnf(str(config.grammar))


def check_form(config: TextConfig) -> None:
    """Raise a ConfigError if no model can write texts of the form.

    Whether a grammar names special tokens that a model lacks shows when the model is known.
    """
    if (form := form_of(config)) is None:
        return
    from treeflash.text.grammar import GrammarError
    from treeflash.text.grammar_sandbox import GrammarSandbox, SandboxError

    try:
        GrammarSandbox(BYTES).run(form.entries)
    except SandboxError as error:
        if OF_A_MODEL not in str(error):
            raise GrammarError(str(error)) from error
