"""The cost of a target forward pass by the size of the tree, measured on this machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from treeflash.config import LoadConfig, SamplingConfig
from treeflash.decoding.interfaces import Backend, TreeVerifier
from treeflash.decoding.tree import DraftTree

TIMED = (1, 5, 8, 12, 16, 32, 64, 128, 256)
"""Tree sizes that are timed; hardware has steps, and some are known to end at 5, 8, 16 and 32."""
SIZES = tuple(sorted({*TIMED, 2, 3, 4, 24, 48, 96, 192}))
"""Tree sizes to choose from; those that are not timed are interpolated linearly."""
MAX_RELATIVE_COST = 4.6
"""In plain forward passes; a size that costs more is left out, and so are all larger ones."""
ROUNDS = 2, 8
"""The fewest and the most rounds of timing."""
ENOUGH_S = 0.2
"""No further round begins once the rounds after the first have taken so many seconds."""
PROMPT_TOKENS = 16
MEMORY = 0.1
"""Weight of the newest measurement in the running mean of its size."""
OUTLIER_FACTOR = 2.0
"""A forward pass that takes longer than this many times the expected was disturbed: it counts as
this many times."""
FRAMEWORKS = ("mlx", "torch")


@dataclass
class VerifyCosts:
    """Seconds of a forward pass by tree size, updated from the forward passes of decoded texts.

    Attributes:
        seconds: by number of nodes, ascending, 1 first; all are finite and above 0.

    Raises:
        ValueError: `seconds` is not like that.
    """

    seconds: dict[int, float]

    def __post_init__(self) -> None:
        sizes, seconds = list(self.seconds), list(self.seconds.values())
        if sizes[:1] != [1] or sizes != sorted(sizes):
            raise ValueError(f"tree sizes must ascend from 1, got {sizes}")
        if not all(0 < x < math.inf for x in seconds):
            raise ValueError(f"seconds must be finite and above 0, got {seconds}")

    @classmethod
    def measure(cls, backend: Backend) -> VerifyCosts:
        """Time the backend's target on bushy trees of arbitrary tokens."""
        with closing(backend.verifier(features=False)) as verifier:
            best = _best_seconds(verifier, backend.vocab_size)
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
        """The costs measured earlier for the same target, hardware and dtype, or measured now.

        Args:
            backend: holds the target.
            target: the target's folder.
            loaded: how the target was loaded.
            folder: where measurements are kept; a folder that cannot be written is not an error.
        """
        weights = sorted((path.name, path.stat().st_size) for path in target.glob("*.safetensors"))
        key = [backend.name, backend.device_name, backend.dtype, loaded.kv_bits, loaded.cuda_graphs]
        threads = os.cpu_count(), os.environ.get("OMP_NUM_THREADS")
        machine = platform.node(), platform.processor(), *threads
        versions = [version(name) for name in FRAMEWORKS if find_spec(name)]
        digest = hashlib.sha256(json.dumps([*key, *machine, versions, weights, TIMED]).encode())
        digest.update((target / "config.json").read_bytes())
        file = folder / f"{digest.hexdigest()[:16]}.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return cls({int(size): float(seconds) for size, seconds in found.items()})
        except (OSError, ValueError, TypeError, AttributeError):  # missing, torn, or not ours
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
        """(n,) seconds of forward passes over trees of n sizes, none above the largest known."""
        found = np.interp(nodes, list(self.seconds), list(self.seconds.values()))
        return np.asarray(found, np.float64)

    def observe(self, nodes: int, seconds: float) -> None:
        """Take in a decoded text's forward pass: contexts grow, and machines change speed."""
        ratio = seconds / float(self.of([nodes])[0])
        change = min(max(ratio, 1 / OUTLIER_FACTOR), OUTLIER_FACTOR) - 1
        for size in self.seconds:
            # A slowdown of one size probably affects the others too, but less surely.
            self.seconds[size] *= 1 + MEMORY * (change if size == nodes else change / 2)


def _best_seconds(verifier: TreeVerifier, vocab_size: int) -> dict[int, float]:
    """The shortest forward pass over trees of each of `TIMED` sizes that may pay."""

    def timed(size: int) -> float:
        tree = _bushy_tree(size, vocab_size)
        before = time.perf_counter()
        verifier.verify(tree, greedy, None)
        return time.perf_counter() - before

    greedy = SamplingConfig()
    verifier.prefill(list(range(min(PROMPT_TOKENS, vocab_size))), greedy, None)
    # The first forward pass of a size also compiles and allocates: the best time counts, and no
    # size is given up because of its first.
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
    return best


def _bushy_tree(nodes: int, vocab_size: int) -> DraftTree:
    """A tree whose nodes have up to four children, much like draft trees.

    Its tokens differ: a single token would take the same experts of a mixture at every node.
    """
    tokens = np.random.default_rng(nodes).integers(0, vocab_size, nodes).astype(np.int32)
    return DraftTree.from_parents(tokens, (np.arange(nodes, dtype=np.int32) - 1) // 4)
