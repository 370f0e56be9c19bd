"""Tiny tokenizers of both kinds, written as a model folder has them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = ["<unk>", "<|start|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
THINKING_TEMPLATE = CHAT_TEMPLATE + "{% if enable_thinking is not false %}<think>{% endif %}"
SAMPLE = "Grüße, 你好 👋🏽! the end, the END.\n\n  naïve é́ € "


def save_folder(folder: Path, tokenizer: RawTokenizer, **config: object) -> Path:
    """Write a tokenizer as a model folder does."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level() -> RawTokenizer:
    """Build byte-level BPE, in which most tokens are bytes or parts of characters."""
    tokenizer = RawTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE] * 3, trainer)
    return tokenizer


def byte_fallback() -> RawTokenizer:
    """Build BPE in the manner of SentencePiece: words with ▁, bytes as a fallback."""
    words = ["▁", "▁the", "▁end", "end", "e", "n", "d", "t", "h", ".", "€", "\n", "▁é"]
    vocabulary = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = RawTokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


BUILDERS = {"byte_level": byte_level, "byte_fallback": byte_fallback}
