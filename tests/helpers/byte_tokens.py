"""A tokenizer of single bytes for tiny pairs, and a pair with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from treeflash.testing.models import edit_config, write_pair

SPECIAL = ["<|start|>", "<|end|>", "<|stop|>"]
END = 1
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "<|start|>assistant: {% if enable_thinking is not false %}<think>{% endif %}"
)


def save_tokenizer(folder: Path, more: Sequence[str] = ()) -> Path:
    """Write a tokenizer of single bytes, with more special tokens, and a template with thinking.

    No token ends a text, unless the folder has a `generation_config.json` that says so.
    """
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *more]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([*SPECIAL, *more])
    raw.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if not (generation_config := folder / "generation_config.json").exists():
        generation_config.write_text("{}")
    return folder


def byte_pair(
    folder: Path, family: str = "llama", seed: int = 3, more: Sequence[str] = (), **settings: Any
) -> tuple[Path, Path]:
    """Write a tiny pair with this tokenizer; returns the folders of target and drafter."""
    size = len(SPECIAL) + 256 + len(more)
    pair = write_pair(folder, family, seeds=(seed, seed + 1), vocab_size=size, **settings)
    save_tokenizer(pair[0], more)
    return pair


def endless_pair(folder: Path) -> list[str]:
    """Write a tiny pair whose texts never end; returns the options that choose it."""
    target, drafter = write_pair(folder, "llama", seeds=(3, 4), vocab_size=300, max_positions=512)
    edit_config(target, lambda config: config.pop("eos_token_id"))
    save_tokenizer(target)
    return ["--target", str(target), "--drafter", str(drafter)]
