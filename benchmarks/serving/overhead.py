"""What HTTP costs: throughput beside the scheduler's, time to first token beside the Python API's.

    python -m benchmarks.serving.overhead --dtype float32

Both decode the same texts with the same options, in turn, `--rounds` times, and the medians count.
It prints a JSON object per line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence

import httpx

import treeflash
from benchmarks.serving.load import PATH
from benchmarks.serving.servers import QUESTIONS, Job, server


async def through_http(url: str, work: Sequence[Job], clients: int) -> float:
    """Seconds in which the clients have streamed all answers."""
    left = list(work)

    async def client(http: httpx.AsyncClient) -> None:
        while left:
            body = {**left.pop().body, "stream": True, "ignore_eos": True}
            async with http.stream("POST", PATH, json=body) as response:
                response.raise_for_status()
                async for _ in response.aiter_lines():
                    pass

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return time.perf_counter() - started


def directly(model: treeflash.LanguageModel, work: Sequence[Job], parallel: int) -> float:
    """Seconds in which the scheduler has decoded all answers."""
    started = time.perf_counter()
    questions = [[{"role": "user", "content": job.question}] for job in work]
    options = {**work[0].options, "stop_token_ids": (), "budget": 16}
    for _ in model.generate_many(questions, parallel=parallel, **options):
        pass
    return time.perf_counter() - started


def first_tokens(model: treeflash.LanguageModel, url: str, repeats: int) -> dict[str, float]:
    """Median milliseconds until the first token of a short prompt, and their difference."""
    job = Job("Why is the sky blue?", 2)
    messages = [{"role": "user", "content": job.question}]
    own, http = [], []
    with httpx.Client(base_url=url, timeout=600) as client:
        for _ in range(repeats):
            started = time.perf_counter()
            next(model.stream(messages, budget=16, **job.options))
            own.append(time.perf_counter() - started)
            started = time.perf_counter()
            with client.stream("POST", PATH, json={**job.body, "stream": True}) as response:
                for line in response.iter_lines():
                    if '"content":"' in line and '"content":""' not in line:
                        break
            http.append(time.perf_counter() - started)
    medians = {"api_ms": statistics.median(own), "http_ms": statistics.median(http)}
    medians["difference_ms"] = medians["http_ms"] - medians["api_ms"]
    return {name: round(1000 * value, 1) for name, value in medians.items()}


def throughput(
    model: treeflash.LanguageModel, url: str, work: Sequence[Job], clients: int, rounds: int
) -> dict[str, float]:
    """Tokens per second of the scheduler and through HTTP, and the second by the first."""
    own, http = [], []
    for _ in range(rounds):
        own.append(directly(model, work, clients))
        http.append(asyncio.run(through_http(url, work, clients)))
    tokens = sum(job.max_tokens for job in work)
    scheduler, through = (tokens / statistics.median(seconds) for seconds in (own, http))
    return {
        "clients": clients,
        "scheduler_tokens_per_s": round(scheduler, 1),
        "http_tokens_per_s": round(through, 1),
        "ratio": round(through / scheduler, 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3, help="of throughput")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20, help="of the first token")
    args = parser.parse_args(argv)
    model = treeflash.load(dtype=args.dtype)
    work = [Job(QUESTIONS[i % len(QUESTIONS)], args.tokens) for i in range(args.texts)]
    options = ("--budget", "16", "--prefix-cache-gb", "0")
    with server("--dtype", args.dtype, *options) as running:
        found = first_tokens(model, running.url, args.repeats)
        print(json.dumps({"first_token": found}), flush=True)
        for clients in args.clients:
            found = throughput(model, running.url, work, clients, args.rounds)
            print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
