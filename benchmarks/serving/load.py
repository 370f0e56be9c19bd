"""The server under load: clients that ask, disconnect, and send invalid requests.

    python -m benchmarks.serving.load --seconds 600 --clients 32

No answer may be lost, mixed up or different. The server runs in bfloat16 and exact mode on the CPU,
and some prompts are so long that they run in chunks. Every finished answer must be the Python API's
answer to the same question and seed, by plain decoding. The results are printed as a JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

import treeflash
from benchmarks.common import Parser, command
from treeflash.errors import ConfigError

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
PATH = "/v1/chat/completions"
KINDS = (*["stream"] * 3, *["whole"] * 2, *["leave"] * 2, "invalid", "long", "none")
LONG = " ".join(QUESTIONS * 4)
"""More tokens than a chunk of a prompt has while other sequences are decoded."""
LOADED: dict[str, Any] = {"backend": "cuda", "device": "cpu", "dtype": "bfloat16"}
INVALID = (b"", b"{", b"[1, 2]", b'{"messages": 5}', b'{"messages": [], "audio": 1}', b"\xff" * 100)


class Job(NamedTuple):
    """A question with decoding options."""

    question: str
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The decoding options, by the names of the Python API and the server."""
        return {name: x for name, x in self._asdict().items() if name != "question"}

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation."""
        return [{"role": "user", "content": self.question}]

    @property
    def body(self) -> dict[str, object]:
        """The body of a request."""
        return {"messages": self.messages, **self.options}


def jobs(count: int) -> list[Job]:
    """Create jobs with short and long answers, greedy and sampled."""
    rng = random.Random(0)
    return [
        Job(QUESTIONS[i % len(QUESTIONS)], rng.randint(4, 48), rng.choice([0.0, 0.8, 1.2]), seed=i)
        for i in range(count)
    ]


class Server(NamedTuple):
    """A running server: its root's URL, its process, and the file with its standard error."""

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
                while not (found := re.search(r" on (http://\S+)\s", log.read_text())):
                    if process.poll() is not None:
                        raise RuntimeError(f"the server did not start:\n{log.read_text()}")
                    time.sleep(0.1)
                yield Server(found[1], process, log)
                process.send_signal(signal.SIGTERM)
                if process.wait(60):
                    raise RuntimeError(f"the server failed:\n{log.read_text()}")
            finally:
                process.kill()


def resident_bytes(process: subprocess.Popen[bytes]) -> int:
    """Read a process's resident memory, on Linux."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 95th percentile, in milliseconds."""
    return {f"p{p}": round(1000 * float(np.percentile(seconds, p)), 1) for p in (50, 95)}


@dataclass
class Observations:
    """The answers and times that the clients observed.

    Attributes:
        counts: requests by kind.
        answers: job, text and number of tokens of each finished answer.
        first_token: seconds to the first token of each stream.
        between: seconds between tokens of streams.
        memory: of the server's process over time, bytes.
    """

    counts: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[Job, str, int]] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


async def client(
    http: httpx.AsyncClient, pool: Sequence[Job], seed: int, observed: Observations
) -> None:
    """Send one request after the other until it is cancelled."""
    rng = random.Random(seed)
    while True:
        kind, job = rng.choice(KINDS), rng.choice(pool)
        observed.counts[kind] += 1
        if kind in ("stream", "leave"):
            await stream(http, job, rng.randint(1, 6) if kind == "leave" else None, observed)
        elif kind == "whole":
            response = await http.post(PATH, json=job.body)
            response.raise_for_status()
            whole = response.json()
            text = whole["choices"][0]["message"]["content"]
            observed.answers.append((job, text, whole["usage"]["completion_tokens"]))
        elif kind == "invalid":
            headers = {"Content-Type": "application/json"}
            response = await http.post(PATH, content=rng.choice(INVALID), headers=headers)
            expect(response, 400)
        elif kind == "long":
            expect(await http.post(PATH, json=Job("word " * 20000, 4).body), 400)
        else:
            expect(await http.get("/nothing"), 404)


async def stream(
    http: httpx.AsyncClient, job: Job, frames: int | None, observed: Observations
) -> None:
    """Read a stream, or only its first frames."""
    text, tokens, sent, newest = "", 0, time.perf_counter(), 0.0
    body = {
        **job.body,
        "stream": True,
        "stream_options": {"include_usage": True, "include_draft_trees": True},
    }
    async with http.stream("POST", PATH, json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                raise RuntimeError(data["error"]["message"])
            for choice in data["choices"]:
                text += choice["delta"].get("content", "")
                new = len(choice.get("draft_tree", {}).get("tokens", ()))
                if new and newest:
                    observed.between += [(now - newest) / new] * new
                elif new:
                    observed.first_token.append(now - sent)
                newest = now if new else newest
            tokens = (data.get("usage") or {}).get("completion_tokens", 0)
            if frames is not None and (frames := frames - 1) <= 0:
                return
    observed.answers.append((job, text, tokens))


def expect(response: httpx.Response, status: int) -> None:
    """Raise unless the response is this error."""
    if response.status_code != status or set(response.json()) != {"error"}:
        raise RuntimeError(f"status {response.status_code}: {response.text[:300]}")


async def load(server: Server, clients: int, seconds: float, pool: Sequence[Job]) -> Observations:
    """Run the clients for some seconds; an error of any client is raised."""
    observed = Observations()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    transport = httpx.AsyncHTTPTransport(limits=limits, retries=5)  # it may not listen yet
    async with httpx.AsyncClient(base_url=server.url, timeout=600, transport=transport) as http:
        tasks = [asyncio.create_task(client(http, pool, i, observed)) for i in range(clients)]
        end = time.monotonic() + seconds
        while time.monotonic() < end and not any(task.done() for task in tasks):
            await asyncio.sleep(1)
            observed.memory.append(resident_bytes(server.process))
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        await asyncio.sleep(2)  # for the iterations in which the server drops the last sequences
        metrics = (await http.get("/metrics")).text
    running = [line for line in metrics.splitlines() if "num_requests_running{" in line]
    observed.counts["left over"] = int(float(running[-1].split()[1]))
    return observed


def different_answers(answers: Sequence[tuple[Job, str, int]]) -> list[str]:
    """Return the answers that are not the text of plain decoding, which has the same tokens."""
    model, different = treeflash.load(exact=True, **LOADED), list[str]()
    for (job, text, tokens), times in Counter(answers).items():
        plain = model.generate(job.messages, method="ar", **job.options)
        if (plain.text, len(plain.token_ids)) != (text, tokens):
            different += [f"{job}: {text!r}"] * times
    return different


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__, json=False)
    options.add_number("--seconds", 600, "how long the clients ask")
    options.add_number("--clients", 32, "clients at once")
    options.add_number("--jobs", 24, "questions with seeds")
    return options


@command(parser)
def main(args: Namespace) -> int:
    """Run the load, print the report, and return 1 if anything is wrong."""
    pool = jobs(args.jobs)
    pool += [job._replace(question=f"{LONG} {job.question}") for job in pool[::4]]
    options = [x for name, value in LOADED.items() for x in (f"--{name}", value)]
    with server("--exact", *options) as running:
        observed = asyncio.run(load(running, args.clients, args.seconds, pool))
        log = running.log.read_text()
    if not (observed.answers and observed.between):
        raise ConfigError(f"too few answers were finished in {args.seconds} s; raise --seconds")
    third = len(observed.memory) // 3
    different = different_answers(observed.answers)
    report: dict[str, Any] = {
        "clients": args.clients,
        "seconds": args.seconds,
        "requests": dict(observed.counts),
        "compared": len(observed.answers),
        "different": len(different),
        "for_example": different[:3],
        "tracebacks": log.count("Traceback"),
        "first_token_ms": percentiles(observed.first_token),
        "inter_token_ms": percentiles(observed.between),
        "memory_mib": [
            max(part) >> 20 for part in (observed.memory[third : 2 * third + 1], observed.memory)
        ],
    }
    print(json.dumps(report, indent=1))
    return int(bool(different or report["tracebacks"] or observed.counts["left over"]))


if __name__ == "__main__":
    sys.exit(main())
