"""What the disk tier of the prefix cache is worth to a conversation that goes on after a restart.

    python -m benchmarks.serving.restart --tokens 20000 --turns 4 --folder states

A prompt of random tokens grows turn by turn; then the caches are opened anew, and one more turn is
answered with the stored states, which have been dropped from the system's page cache, and without.
The target is the default one, with as many positions as the conversation needs: its text has no
meaning there, and its speed and sizes are the same. The results are printed as one JSON object per
line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import treeflash
from benchmarks.common import Parser, machine
from treeflash.cli.console import guarded
from treeflash.config import DTYPES, GIB
from treeflash.decoding import Request, SchedulerConfig
from treeflash.decoding.loop import Step
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.hub.models import resolve_target


def with_positions(source: Path, folder: Path, positions: int) -> Path:
    """Link a model into a folder, with a configuration that has more positions."""
    for path in source.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": positions})
    )
    return folder


class Run:
    """A scheduler with new caches of both tiers, or of memory alone."""

    def __init__(self, model: treeflash.LanguageModel, folder: Path | None) -> None:
        self.disk = None if folder is None else model.disk_cache(folder, 64 * GIB)
        self.cache = PrefixCache(16 * GIB, self.disk)
        self.scheduler = model.scheduler(SchedulerConfig(), self.cache)
        self.model = model

    def answer(self, prompt: Sequence[int], tokens: int) -> dict[str, float]:
        """Measure an answer; also adds its tokens to the result."""
        config = self.model.decode_config({"max_tokens": tokens, "stop_token_ids": ()})
        started, first, steps = time.perf_counter(), 0.0, list[Step]()
        for _, step in self.scheduler.decode([Request(prompt_ids=prompt, config=config)]):
            first = first or time.perf_counter() - started
            steps.append(step)
        self.tokens = [token for step in steps for token in step.tokens]
        return {
            "prompt": len(prompt),
            "cached": steps[0].cached_tokens,
            "from_disk": steps[0].disk_tokens,
            "first_token_s": round(first, 2),
        }

    def stored(self) -> int:
        """Write everything, and return the bytes that were written."""
        self.scheduler.close()
        self.cache.close()
        return 0 if self.disk is None else self.disk.written_bytes


def drop_from_page_cache(folder: Path) -> None:
    """Let the next reader of the files read the disk, where the system can do that."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__, json=False)
    options.add_number("--tokens", 20_000, "tokens of the first prompt")
    options.add_number("--turns", 4, "turns before the restart")
    options.add_number("--new", 300, "prompt tokens of a later turn")
    options.add_number("--answer", 32, "tokens of an answer")
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    options.add_argument("--backend", metavar="NAME", help="(default: the best one installed)")
    options.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="for the states (default: a temporary one)"
    )
    return options


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        states = args.folder or Path(scratch) / "states"
        (Path(scratch) / "target").mkdir()
        positions = args.tokens + args.turns * (args.new + args.answer) + 1024
        target = with_positions(resolve_target(None), Path(scratch) / "target", positions)
        drafter = "smollm2-135m-treeflash"
        model = treeflash.load(target, drafter, backend=args.backend, dtype=args.dtype)
        print(json.dumps(machine()), flush=True)
        vocab_size = model.backend.vocab_size

        def report(what: str, **results: object) -> None:
            print(json.dumps({"what": what, **results}), flush=True)

        prompt = rng.integers(10, vocab_size, args.tokens).tolist()
        for turn in range(1, args.turns + 1):
            # Each turn has its own caches, as after a restart, so that its bytes are known.
            run = Run(model, states)
            result = run.answer(prompt, args.answer)
            report(f"turn {turn}", **result, written_bytes=run.stored())
            prompt = [*prompt, *run.tokens, *rng.integers(10, vocab_size, args.new).tolist()]
        drop_from_page_cache(states)
        texts = []
        for what, folder in (("with the disk tier", states), ("without", None)):
            run = Run(model, folder)
            report(what, **run.answer(prompt, args.answer))
            texts.append(run.tokens)
            run.stored()
        report("comparison", same_text=texts[0] == texts[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
