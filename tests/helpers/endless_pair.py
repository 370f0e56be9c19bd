"""A tiny pair without an end token, so that benchmarks decode as many tokens as they ask for."""

from __future__ import annotations

from pathlib import Path

from byte_tokens import save_tokenizer

from treeflash.testing.models import edit_config, write_pair


def endless_pair(folder: Path) -> list[str]:
    """Write the pair; returns the options that choose it."""
    target, drafter = write_pair(folder, "llama", seeds=(3, 4), vocab_size=300, max_positions=512)
    edit_config(target, lambda config: config.pop("eos_token_id"))
    save_tokenizer(target)
    return ["--target", str(target), "--drafter", str(drafter)]
