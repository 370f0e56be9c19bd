"""A scheduler whose prefix cache has a disk tier, as one process after another would have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.disk_cache import DiskCache
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.state_files import PrefixKeys, root_key
from treeflash.reference.backend import load
from treeflash.testing.comparisons import tokens_of
from treeflash.testing.models import write_pair


def stored_pair(folder: Path, family: str) -> Any:
    """A tiny pair; its weights are the same in every process."""
    return load(*write_pair(folder, family), LoadConfig())


class Process:
    """A scheduler with the two tiers; leaving the block ends it as a process ends."""

    BLOCK = 8
    IDENTITY = b"pair"

    def __init__(
        self,
        pair: Any,
        folder: Path,
        *,
        nbytes: int = 1 << 30,
        identity: bytes = IDENTITY,
        memory: int = 1 << 30,
        scan_s: float = 0.0,
    ) -> None:
        self.disk = DiskCache(folder, nbytes, identity, block=self.BLOCK, scan_s=scan_s)
        self.cache = PrefixCache(memory, self.disk)
        self.scheduler = Scheduler(pair, prefix_cache=self.cache)
        self.recurrent = pair.open(1, drafts=False).needs_snapshots

    @classmethod
    def keys(cls, tokens: list[int]) -> PrefixKeys:
        """The keys of a sequence that drafts, without a salt."""
        identity = cls.IDENTITY + cls.BLOCK.to_bytes(4, "big")
        return PrefixKeys(root_key(identity, drafts=True, salt=""), tokens, cls.BLOCK)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.scheduler.close()
        self.cache.close()

    def answer(
        self, prompt: list[int], salt: str = "", method: str = "treeflash", tokens: int = 12
    ) -> tuple[list[int], tuple[int, int]]:
        """The tokens of the answer, and how many of the prompt's came from memory and the disk."""
        config = DecodeConfig(method=method, budget=8, max_tokens=tokens)
        request = Request(prompt_ids=prompt, config=config, cache_salt=salt)
        steps = [step for _, step in self.scheduler.decode([request])]
        cached, disk = steps[0].cached_tokens, steps[0].disk_tokens
        return tokens_of(steps), (cached - disk, disk)


def answered(
    pair: Any, folder: Path, prompt: list[int], **settings: Any
) -> tuple[list[int], tuple[int, int]]:
    """What a process answers that does nothing else."""
    with Process(pair, folder) as process:
        return process.answer(prompt, **settings)


def prompt_of(length: int, seed: int = 0, vocab_size: int = 24) -> list[int]:
    return np.random.default_rng(seed).integers(1, vocab_size, length).tolist()


def plain(pair: Any, prompt: list[int], tokens: int = 12) -> list[int]:
    """The tokens of plain decoding, without any cache."""
    config = DecodeConfig(method="ar", max_tokens=tokens)
    steps = Scheduler(pair).decode([Request(prompt_ids=prompt, config=config)])
    return [token for _, step in steps for token in step.tokens]
