"""Tiny pairs whose chat and response templates know tools and reasoning."""

from __future__ import annotations

import json
from pathlib import Path

from byte_tokens import byte_pair, save_tokenizer
from scripted_model import reference_model

from treeflash.language_model import LanguageModel
from treeflash.text.tokenizer import Tokenizer

COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
"""A JSON schema of an object with one field, for forms of answers and arguments of functions."""
CHAT_TEMPLATE = (
    "{% if tools %}<|start|>tools: {{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<|end|>{% endfor %}<|start|>assistant: "
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
)
FIELDS = {
    "reasoning_content": {"open": "<think>", "close": "</think>"},
    "tool_calls": {
        "open_pattern": r"\s*<call>",
        "close": "</call>",
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": "{content}"},
    },
    "content": {},
}
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant: ",
    "fields": FIELDS,
}


def tool_tokenizer(
    folder: Path,
    response_template: dict | None = RESPONSE_TEMPLATE,
    chat_template: str = CHAT_TEMPLATE,
) -> Tokenizer:
    """Write and load the tokenizer."""
    path = save_tokenizer(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": chat_template}
    if response_template is not None:
        config["response_template"] = response_template
    path.write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return Tokenizer.from_folder(folder)


def tool_model(
    folder: Path,
    response_template: dict | None = RESPONSE_TEMPLATE,
    chat_template: str = CHAT_TEMPLATE,
) -> LanguageModel:
    """Write and load a random pair with that tokenizer."""
    target, drafter = byte_pair(folder)
    tool_tokenizer(target, response_template, chat_template)
    return reference_model(target, drafter)
