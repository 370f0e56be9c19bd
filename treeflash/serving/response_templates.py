"""The forms in which families of models write reasoning and tool calls.

They are response templates as transformers reads them, for tokenizers that have none. One is chosen
by the model's type, or by name with `--tool-call-parser`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _family_template(anchor: str | list[str], calls: Any, call: Any, **fields: Any) -> Any:
    """Build a family's response template; a message begins after `anchor` in the prompt.

    `calls` is the form of a call's text; `call` makes OpenAI's form of a call from its parts.
    """
    transform = {"type": "function", "function": call}
    fields = {"tool_calls": {"repeats": True, "transform": transform, **calls}, **fields}
    return {"defaults": {"role": "assistant"}, "start_anchor": anchor, "fields": fields}


SPACE_RUN = r"(?<!\s)\s*"
"""All white space between two texts. A search for it tries no place inside the space: before a
lookahead, which no search can skip to, that would take the square of its length for each chunk."""
NAMED_CALL = {"name": "{name}", "arguments": "{content}"}
CHATML: dict[str, Any] = {
    "anchor": "<|im_start|>assistant\n",
    "reasoning_content": {"open": "<think>", "close": "</think>"},
    # White space before an end token or a call is not content.
    "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)"},
}
QWEN = _family_template(
    **CHATML,
    calls={"open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "content": "json"},
    call="{content}",
)
QWEN3_5 = _family_template(
    **CHATML,
    calls={
        "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        "close_pattern": r"</function>\s*</tool_call>",
        "content": "xml-inline",
        # A value has lines of its own; other white space belongs to it.
        "content_args": {
            "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
        },
    },
    call=NAMED_CALL,
)
GEMMA4 = _family_template(
    ["<|turn>model\n", "<tool_response|>"],
    calls={
        "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
        "close": "<tool_call|>",
        "content": "json",
        "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
    },
    call=NAMED_CALL,
    reasoning_content={"open": "<|channel>thought\n", "close": "<channel|>"},
    content={"close": ["<turn|>", "<|tool_response>", "<eos>"]},
)
JSON_CALL = {"name": "{content.name}", "arguments": "{content.parameters}"}
LLAMA3 = _family_template(
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    # A message is either text or one call, which ends with the message.
    calls={"open_pattern": SPACE_RUN + r'(?=\{\s*"name")', "content": "json"},
    call=JSON_CALL,
    content={},
)
MISTRAL = _family_template(
    "[/INST]",
    calls={"open": "[TOOL_CALLS]", "content": "json", "transform_each": True},
    call={"name": "{name}", "arguments": "{arguments}"},
    content={},
)


def _deepseek(opening: str, close: str) -> Any:
    """Build a DeepSeek V3's response template; all calls of a message are in one more pair."""
    return _family_template(
        "<｜Assistant｜>",
        calls={
            "open_pattern": rf"\s*(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>{opening}",
            "close_pattern": rf"{close}<｜tool▁call▁end｜>",
            "content": "json",
        },
        call=NAMED_CALL,
        reasoning_content={"open": "<think>", "close": "</think>"},
        content={"close_pattern": r"\s*<｜tool▁calls▁end｜>"},
    )


DEEPSEEK_V3 = _deepseek(r"function<｜tool▁sep｜>(?P<name>[^\n<]+)\n```json\n", r"\s*```")
DEEPSEEK_V31 = _deepseek(r"(?P<name>[^\n<]+)<｜tool▁sep｜>", r"\s*")
TOOL_CALL_PARSERS: Mapping[str, Mapping[str, Any]] = {
    "hermes": QWEN,
    "qwen3_coder": QWEN3_5,
    "gemma4": GEMMA4,
    "llama3_json": LLAMA3,
    "mistral": MISTRAL,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v31": DEEPSEEK_V31,
}
"""Response templates by vLLM's names of tool call parsers."""
