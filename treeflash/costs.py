"""What a target's forward costs by the size of the tree, measured on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from treeflash.config import LoadConfig, SamplingConfig
from treeflash.interfaces import Backend
from treeflash.tree import DraftTree

TIMED = (1, 2, 5, 8, 16, 32, 64, 128, 256)
"""Trees that are timed; hardware has steps, and some are known to end at 5, 8, 16 and 32."""
SIZES = tuple(sorted({*TIMED, 3, 4, 12, 24, 48, 96, 192}))
"""Trees that are chosen from; the time of those between is read off a straight line."""
DEAREST = 4.0
"""Plain forwards; a size that costs more is not looked at, nor are larger ones."""
ROUNDS = 2, 8
ENOUGH_S = 0.3
"""At least so many rounds, and more until so much time has passed, at most so many."""
PROMPT_TOKENS = 16
MEMORY = 0.1
"""Weight of the newest measurement among those of its size."""


@dataclass
class VerifyCosts:
    """Seconds of a forward over trees of some of `SIZES` nodes; follows what is measured later.

    Attributes:
        seconds: by size, 1 among them.
    """

    seconds: dict[int, float]

    @classmethod
    def measure(cls, backend: Backend) -> VerifyCosts:
        """Time the backend's target on bushy trees of arbitrary tokens."""
        verifier = backend.verifier(features=False)
        greedy = SamplingConfig()
        verifier.prefill(list(range(min(PROMPT_TOKENS, backend.vocab_size))), greedy, None)
        best: dict[int, float] = {}
        started = time.perf_counter()
        for number in range(ROUNDS[1]):
            if number >= ROUNDS[0] and time.perf_counter() - started > ENOUGH_S:
                break
            for size in [size for size in TIMED if number == 0 or size in best]:
                before = time.perf_counter()
                verifier.verify(_bush(size), greedy, None)
                seconds = time.perf_counter() - before
                # The first forwards also compile and allocate: the best counts.
                best[size] = min(best.get(size, seconds), seconds)
                if number == 0 and seconds > DEAREST * best[1]:
                    break
        sizes = [size for size in SIZES if size <= max(best)]
        line = np.interp(sizes, list(best), list(best.values())).tolist()
        pairs = zip(sizes, line, strict=True)
        return cls({size: seconds for size, seconds in pairs if seconds <= DEAREST * best[1]})

    @classmethod
    def remembered(
        cls, backend: Backend, target: Path, loaded: LoadConfig, folder: Path
    ) -> VerifyCosts:
        """Those measured earlier for the same target, device and type, else measure them now.

        Args:
            backend: with the target.
            target: its folder.
            loaded: how it was loaded.
            folder: where files of measurements are kept; that none can be is no error.
        """
        weights = sorted((path.name, path.stat().st_size) for path in target.glob("*.safetensors"))
        key = [backend.name, backend.device, backend.dtype, loaded.kv_bits, loaded.compile]
        threads = os.cpu_count(), os.environ.get("OMP_NUM_THREADS")
        machine = platform.node(), platform.processor(), *threads
        digest = hashlib.sha256(json.dumps([*key, *machine, weights, TIMED]).encode())
        digest.update((target / "config.json").read_bytes())
        file = folder / f"{digest.hexdigest()[:16]}.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return cls({int(size): float(seconds) for size, seconds in found.items()})
        except (OSError, ValueError, AttributeError):
            costs = cls.measure(backend)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{time.monotonic_ns()}")
            scratch.write_text(json.dumps(costs.seconds), encoding="utf-8")
            scratch.replace(file)
        except OSError:
            pass  # a read-only home: the next process measures again
        return costs

    def observe(self, nodes: int, seconds: float) -> None:
        """Take in a forward of a decoded text: contexts grow, and machines change their speed."""
        if nodes not in self.seconds:
            return
        # One hiccup of the machine is no new speed.
        change = min(max(seconds / self.seconds[nodes], 0.5), 2.0) - 1
        for size in self.seconds:
            # What slows one size down slows others too, but each less surely.
            self.seconds[size] *= 1 + MEMORY * (change if size == nodes else change / 2)


def _bush(nodes: int) -> DraftTree:
    """A tree of which every node has up to four children, as draft trees are about."""
    order = np.arange(nodes, dtype=np.int32)
    parents = (order - 1) // 4
    parents[0] = -1
    depths = np.zeros(nodes, np.int32)
    for node in order[1:]:
        depths[node] = depths[parents[node]] + 1
    return DraftTree(np.zeros(nodes, np.int32), parents, depths, np.zeros(nodes))
