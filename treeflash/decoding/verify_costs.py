"""The cost of a target forward pass by the size of the tree, measured on this machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree

TIMED = (1, 5, 8, 10, 12, 16, 32, 64, 128, 256)
"""Tree sizes that are timed; hardware has steps; some are known to end at 5, 8, 10, 16 and 32."""
SIZES = tuple(sorted({*TIMED, 2, 3, 4, 24, 48, 96, 192}))
"""Tree sizes to choose from; those that are not timed are interpolated linearly."""
MAX_RELATIVE_COST = 4.6
"""In plain forward passes; a size that costs more is left out, and so are all larger ones."""
ROUNDS = 2, 8
"""The fewest and the most rounds of timing."""
ENOUGH_S = 0.2
"""No further round begins once the rounds after the first have taken so many seconds."""
PROMPT_TOKENS, LONG_PROMPT_TOKENS = 16, 256
SMOOTHING = 0.1
"""Weight of the newest measurement in the running mean of its size."""
OUTLIER_FACTOR = 2.0
"""A forward pass that takes longer than this many times the expected was disturbed: it counts as
this many times."""
FRAMEWORKS = ("mlx", "torch")


@dataclass
class VerifyCosts:
    """Seconds of a forward pass by tree size, updated from the forward passes of decoded texts.

    Attributes:
        seconds: by number of nodes, ascending, 1 first, after a short prompt; all are finite and
            above 0.
        read_s: further seconds for each row and committed position that it reads.
        texts_s: further seconds of a pass over several texts, whose attention is computed text by
            text; by number of texts, rounded up to a power of two.

    Raises:
        ValueError: `seconds` is not like that.
    """

    seconds: dict[int, float]
    read_s: float = 0.0
    texts_s: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes, seconds = list(self.seconds), list(self.seconds.values())
        if sizes[:1] != [1] or sizes != sorted(sizes):
            raise ValueError(f"tree sizes must ascend from 1, got {sizes}")
        if not all(0 < x < math.inf for x in seconds):
            raise ValueError(f"seconds must be finite and above 0, got {seconds}")
        if not 0 <= self.read_s < math.inf:
            raise ValueError(f"read_s must be finite and 0 or more, got {self.read_s}")

    @classmethod
    def measure(cls, backend: Backend) -> VerifyCosts:
        """Time the backend's target on bushy trees of arbitrary tokens."""

        def timed(size: int) -> float:
            tree = _bushy_tree(size, backend.vocab_size)
            before = time.perf_counter()
            text.verify(tree)
            return time.perf_counter() - before

        prompt = [token % backend.vocab_size for token in range(LONG_PROMPT_TOKENS)]
        text = TextSession(backend, capacity=LONG_PROMPT_TOKENS + max(TIMED))
        text.extend(prompt[:PROMPT_TOKENS])
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
        sizes = [size for size in SIZES if size <= max(best)]
        line = np.interp(sizes, list(best), list(best.values())).tolist()
        pairs = zip(sizes, line, strict=True)
        limit = MAX_RELATIVE_COST * best[1]
        costs = {size: seconds for size, seconds in pairs if seconds <= limit}
        rows = max(size for size in best if size in costs)
        longer_s = 0.0
        if backend.max_positions >= LONG_PROMPT_TOKENS:
            text.extend(prompt[PROMPT_TOKENS:])
            longer_s = min(timed(rows) for _ in range(ROUNDS[0])) - best[rows]
        text.close()
        reads = rows * (LONG_PROMPT_TOKENS - PROMPT_TOKENS)
        return cls(costs, max(longer_s, 0.0) / reads)

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
        key = [
            backend.name,
            backend.device_name,
            backend.dtype,
            loaded.kv_bits,
            loaded.cuda_graphs,
            loaded.compile,
        ]
        threads = os.cpu_count(), os.environ.get("OMP_NUM_THREADS")
        machine = platform.node(), platform.processor(), *threads
        versions = [version(name) for name in FRAMEWORKS if find_spec(name)]
        digest = hashlib.sha256(json.dumps([*key, *machine, versions, weights, TIMED]).encode())
        digest.update((target / "config.json").read_bytes())
        file = folder / f"{digest.hexdigest()[:16]}.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            seconds = {int(size): float(cost) for size, cost in found["seconds"].items()}
            return cls(seconds, float(found["read_s"]))
        except (OSError, ValueError, TypeError, AttributeError, KeyError):  # missing or torn
            costs = cls.measure(backend)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{time.monotonic_ns()}")
            measured = {"seconds": costs.seconds, "read_s": costs.read_s}
            scratch.write_text(json.dumps(measured), encoding="utf-8")
            scratch.replace(file)
        except OSError:
            pass  # a read-only home: the next process measures again
        return costs

    @property
    def largest(self) -> int:
        """The most nodes that a tree can pay for."""
        return max(self.seconds)

    def of(
        self, rows: Sequence[int] | NDArray[np.int64], reads: Sequence[float], texts: int = 1
    ) -> NDArray[np.float64]:
        """(n,) seconds of n forward passes.

        Args:
            rows: (n,) nodes of all trees together.
            reads: (n,) the sum over rows of the committed positions that each reads.
            texts: trees in a pass.
        """
        sizes, seconds = list(self.seconds), list(self.seconds.values())
        found = np.interp(rows, sizes, seconds)
        # Beyond the largest size the last slope continues.
        if len(sizes) > 1:
            slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
            found += np.maximum(np.asarray(rows) - sizes[-1], 0) * max(slope, 0.0)
        found = found + self.read_s * np.asarray(reads, np.float64)
        # Below what one tree of as many rows takes, if that was measured while others computed.
        further = found + self.texts_s.get(power_of_two(texts), 0.0)
        return np.asarray(np.maximum(further, found / OUTLIER_FACTOR), np.float64)

    def observe(self, rows: int, reads: float, texts: int, seconds: float) -> None:
        """Take in a forward pass of decoding; machines change their speed."""
        expected = float(self.of([rows], [reads], texts)[0])
        ratio = min(max(seconds / expected, 1 / OUTLIER_FACTOR), OUTLIER_FACTOR)
        change = SMOOTHING * (ratio - 1)
        if texts > 1:
            number = power_of_two(texts)
            weight = SMOOTHING if number in self.texts_s else 1.0
            known = self.texts_s.get(number, 0.0)
            self.texts_s[number] = known + weight * (ratio - 1) * expected
            return
        for size in self.seconds:
            # A slowdown of one size probably affects the others too, but less surely.
            self.seconds[size] *= 1 + (change if size == rows else change / 2)


def power_of_two(texts: int) -> int:
    """The number of texts rounded up to a power of two, by which measurements are kept."""
    return 1 << (texts - 1).bit_length()


def _bushy_tree(nodes: int, vocab_size: int) -> DraftTree:
    """A tree whose nodes have up to four children, much like draft trees.

    Its tokens differ: a single token would take the same experts of a mixture at every node.
    """
    tokens = np.random.default_rng(nodes).integers(0, vocab_size, nodes).astype(np.int32)
    return DraftTree.from_parents(tokens, (np.arange(nodes, dtype=np.int32) - 1) // 4)
