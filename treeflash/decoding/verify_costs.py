"""What a target's forward costs by the size of the tree, measured on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from treeflash.config import LoadConfig, SamplingConfig
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.tree import DraftTree

TIMED = (1, 5, 8, 12, 16, 32, 64, 128, 256)
"""Trees that are timed; hardware has steps, and some are known to end at 5, 8, 16 and 32."""
SIZES = tuple(sorted({*TIMED, 2, 3, 4, 24, 48, 96, 192}))
"""Trees that are chosen from; what is not timed is read off straight lines between."""
MAX_RELATIVE_COST = 4.6
"""Plain forwards; a size that costs more is not looked at, nor are larger ones."""
ROUNDS = 2, 8
ENOUGH_S = 0.2
"""At least so many rounds, and more until so much time has passed since the first, at most so
many."""
PROMPT_TOKENS = 16
MEMORY = 0.1
"""Weight of the newest measurement among those of its size."""
OUTLIER_FACTOR = 2.0
"""A forward that takes so many times as long as expected was disturbed: no more is believed."""
FRAMEWORKS = ("mlx", "torch")


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

        def timed(size: int) -> float:
            tree = _bushy_tree(size, backend.vocab_size)
            before = time.perf_counter()
            verifier.verify(tree, greedy, None)
            return time.perf_counter() - before

        verifier = backend.verifier(features=False)
        greedy = SamplingConfig()
        verifier.prefill(list(range(min(PROMPT_TOKENS, backend.vocab_size))), greedy, None)
        # The first forward of a size also compiles and allocates: the best counts, and no size is
        # given up for its first.
        best: dict[int, float] = {}
        for size in TIMED:
            best[size] = timed(size)
            if best[size] > MAX_RELATIVE_COST * best[1]:
                best[size] = min(best[size], timed(size))
            if best[size] > MAX_RELATIVE_COST * best[1]:
                break
        started = time.perf_counter()
        for number in range(1, ROUNDS[1]):
            if number >= ROUNDS[0] and time.perf_counter() - started > ENOUGH_S:
                break
            for size in [size for size in best if best[size] <= MAX_RELATIVE_COST * best[1]]:
                best[size] = min(best[size], timed(size))
        sizes = [size for size in SIZES if size <= max(best)]
        line = np.interp(sizes, list(best), list(best.values())).tolist()
        pairs = zip(sizes, line, strict=True)
        return cls(
            {size: seconds for size, seconds in pairs if seconds <= MAX_RELATIVE_COST * best[1]}
        )

    @classmethod
    def cached(
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
        key = [backend.name, backend.device, backend.dtype, loaded.kv_bits, loaded.cuda_graphs]
        threads = os.cpu_count(), os.environ.get("OMP_NUM_THREADS")
        machine = platform.node(), platform.processor(), *threads
        versions = [version(name) for name in FRAMEWORKS if find_spec(name)]
        digest = hashlib.sha256(json.dumps([*key, *machine, versions, weights, TIMED]).encode())
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

    def of(self, nodes: Sequence[int]) -> NDArray[np.float64]:
        """Seconds of forwards over trees of so many nodes, of the most in `seconds` or fewer."""
        found = np.interp(nodes, list(self.seconds), list(self.seconds.values()))
        return np.asarray(found, np.float64)

    def observe(self, nodes: int, seconds: float) -> None:
        """Take in a forward of a decoded text: contexts grow, and machines change their speed."""
        ratio = seconds / float(self.of([nodes])[0])
        change = min(max(ratio, 1 / OUTLIER_FACTOR), OUTLIER_FACTOR) - 1
        for size in self.seconds:
            # What slows one size down slows others too, but each less surely.
            self.seconds[size] *= 1 + MEMORY * (change if size == nodes else change / 2)


def _bushy_tree(nodes: int, vocab_size: int) -> DraftTree:
    """A tree of which every node has up to four children, as draft trees are about.

    Its tokens differ: the same one everywhere would always take the same experts of a mixture.
    """
    tokens = np.random.default_rng(nodes).integers(0, vocab_size, nodes).astype(np.int32)
    order = np.arange(nodes, dtype=np.int32)
    parents = (order - 1) // 4
    parents[0] = -1
    depths = np.zeros(nodes, np.int32)
    for node in order[1:]:
        depths[node] = depths[parents[node]] + 1
    return DraftTree(tokens, parents, depths, np.zeros(nodes))
