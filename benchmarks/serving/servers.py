"""A server in its own process, and requests for it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from treeflash.text.options import Options

QUESTIONS = (
    "Why is the sky blue?",
    "Name three rivers in Europe.",
    "Count to ten.",
    "Write a Python function that adds two numbers.",
    "A farmer has 12 hens and each lays 5 eggs a week. How many eggs are there in 3 weeks?",
    "Explain what a compiler does.",
    "What is the capital of Portugal?",
    "Write a short poem about the sea.",
)


@dataclass(frozen=True)
class Job:
    """A question with decoding options."""

    question: str
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0

    @property
    def options(self) -> Options:
        """The decoding options, by the names of the Python API and the server."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    @property
    def body(self) -> dict[str, object]:
        """The body of a request."""
        return {"messages": [{"role": "user", "content": self.question}], **self.options}


def jobs(count: int) -> list[Job]:
    """Create jobs with short and long answers, greedy and sampled."""
    rng = random.Random(0)
    return [
        Job(QUESTIONS[i % len(QUESTIONS)], rng.randint(4, 48), rng.choice([0.0, 0.8, 1.2]), seed=i)
        for i in range(count)
    ]


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: its root.
        process: its process.
        log: the file with its standard error.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def server(*options: str) -> Iterator[Server]:
    """Run a server on a free port; after SIGTERM it must exit with status 0."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "treeflash", "serve", "--port", "0", *options]
        with log.open("wb") as file, subprocess.Popen(command, stderr=file) as process:
            try:
                yield Server(_address(log, process), process, log)
                process.send_signal(signal.SIGTERM)
                if process.wait(60):
                    raise RuntimeError(f"the server failed:\n{log.read_text()}")
            finally:
                process.kill()


def _address(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait until the server is ready; returns its URL."""
    while True:
        time.sleep(0.1)
        if process.poll() is not None:
            raise RuntimeError(f"the server did not start:\n{log.read_text()}")
        _, _, rest = log.read_text().partition(" on http://")
        if not rest:
            continue
        url = f"http://{rest.split()[0]}"
        try:
            httpx.get(f"{url}/health", timeout=5).raise_for_status()
        except httpx.HTTPError:
            continue
        return url


def resident_bytes(process: subprocess.Popen[bytes]) -> int:
    """Read a process's resident memory, on Linux."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 95th percentile, in milliseconds."""
    return {f"p{p}": round(1000 * float(np.percentile(seconds, p)), 1) for p in (50, 95)}
