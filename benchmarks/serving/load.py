"""Clients that ask, disconnect, and send what is wrong: no answer may be lost, mixed or different.

    python -m benchmarks.serving.load --seconds 600 --clients 32

It prints a JSON object. Every finished answer is compared with the Python API's for the same
question and seed, in float32. It may differ only where rounding explains it; see `near_ties`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

import treeflash
from benchmarks.serving.near_ties import Judge
from benchmarks.serving.servers import Job, Server, jobs, percentiles, resident_bytes, server

PATH = "/v1/chat/completions"
KINDS = ("stream", "stream", "stream", "whole", "whole", "leave", "leave", "wrong", "long", "none")
WRONG = (b"", b"{", b"[1, 2]", b'{"messages": 5}', b'{"messages": [], "audio": 1}', b"\xff" * 100)


@dataclass
class Findings:
    """What the clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[Job, str, int]] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


async def client(http: httpx.AsyncClient, pool: Sequence[Job], seed: int, found: Findings) -> None:
    """Send one request after the other until it is cancelled."""
    rng = random.Random(seed)
    while True:
        kind, job = rng.choice(KINDS), rng.choice(pool)
        found.counts[kind] += 1
        if kind in ("stream", "leave"):
            await stream(http, job, rng.randint(1, 6) if kind == "leave" else None, found)
        elif kind == "whole":
            response = await http.post(PATH, json=job.body)
            response.raise_for_status()
            whole = response.json()
            text = whole["choices"][0]["message"]["content"]
            found.answers.append((job, text, whole["usage"]["completion_tokens"]))
        elif kind == "wrong":
            headers = {"Content-Type": "application/json"}
            response = await http.post(PATH, content=rng.choice(WRONG), headers=headers)
            expect(response, 400)
        elif kind == "long":
            expect(await http.post(PATH, json=Job("word " * 20000, 4).body), 400)
        else:
            expect(await http.get("/nothing"), 404)


async def stream(http: httpx.AsyncClient, job: Job, frames: int | None, found: Findings) -> None:
    """Read a stream, or only so many frames of it."""
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
                    found.between += [(now - newest) / new] * new
                elif new:
                    found.first_token.append(now - sent)
                newest = now if new else newest
            tokens = (data.get("usage") or {}).get("completion_tokens", 0)
            if frames is not None and (frames := frames - 1) <= 0:
                return
    found.answers.append((job, text, tokens))


def expect(response: httpx.Response, status: int) -> None:
    """Raise unless the response is this error."""
    if response.status_code != status or set(response.json()) != {"error"}:
        raise RuntimeError(f"status {response.status_code}: {response.text[:300]}")


async def load(server: Server, clients: int, seconds: float, pool: Sequence[Job]) -> Findings:
    """Let the clients work for so long; raises what goes wrong."""
    found = Findings()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as http:
        tasks = [asyncio.create_task(client(http, pool, i, found)) for i in range(clients)]
        end = time.monotonic() + seconds
        while time.monotonic() < end and not any(task.done() for task in tasks):
            await asyncio.sleep(1)
            found.memory.append(resident_bytes(server.process))
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        await asyncio.sleep(2)  # for the iterations in which the server drops the last texts
        metrics = (await http.get("/metrics")).text
    running = [line for line in metrics.splitlines() if "num_requests_running " in line]
    found.counts["left over"] = int(float(running[-1].split()[1]))
    return found


@dataclass
class Comparison:
    """Of the answers with the Python API's.

    Attributes:
        rounding: of logits, nats, which may decide near-ties.
        near_ties: answers that took the other token at near-ties, and the margins there.
        different: answers that cannot be explained.
    """

    rounding: float
    near_ties: Counter[str] = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)


def compare(answers: Sequence[tuple[Job, str, int]]) -> Comparison:
    """Compare each answer with the Python API's for the same question and seed."""
    model = treeflash.load(dtype="float32")
    judge = Judge.of(model, list(dict.fromkeys(job for job, _, _ in answers)))
    found = Comparison(judge.rounding)
    for (job, text, tokens), times in Counter(answers).items():
        margins = judge.near_ties(job, text, tokens)
        if margins is None:
            found.different += [f"{job}: {text!r}"] * times
        elif margins:
            shown = ", ".join(f"{margin:.1e}" for margin in margins)
            found.near_ties[f"{job}: {shown}"] += times
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the load, print what was found, and return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=24, help="different questions and seeds")
    args = parser.parse_args(argv)
    with server("--dtype", "float32") as running:
        found = asyncio.run(load(running, args.clients, args.seconds, jobs(args.jobs)))
        log = running.log.read_text()
    third = len(found.memory) // 3
    compared = compare(found.answers)
    report: dict[str, Any] = {
        "clients": args.clients,
        "seconds": args.seconds,
        "requests": dict(found.counts),
        "compared": len(found.answers),
        "different": len(compared.different),
        "for_example": compared.different[:3],
        "near_ties": dict(compared.near_ties),
        "rounding": compared.rounding,
        "tracebacks": log.count("Traceback"),
        "first_token_ms": percentiles(found.first_token),
        "inter_token_ms": percentiles(found.between),
        "memory_mib": [max(part) >> 20 for part in (found.memory[third : 2 * third], found.memory)],
    }
    print(json.dumps(report, indent=1))
    return int(bool(compared.different or report["tracebacks"] or found.counts["left over"]))


if __name__ == "__main__":
    sys.exit(main())
