"""The cost of HTTP: throughput and time to the first token, with the server and without.

    python -m benchmarks.serving.overhead --dtype float32

Throughput is compared with the scheduler's, the time to the first token with the Python API's. Both
sides decode the same prompts with the same options, in turn, and the medians count. The results are
printed as one JSON object per line.
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
from treeflash.text.options import Options


async def http_seconds(url: str, work: Sequence[Job], clients: int) -> float:
    """Measure the seconds in which the clients have streamed all answers."""
    waiting = list(work)

    async def client(http: httpx.AsyncClient) -> None:
        while waiting:
            body = {**waiting.pop().body, "stream": True, "ignore_eos": True}
            async with http.stream("POST", PATH, json=body) as response:
                response.raise_for_status()
                async for _ in response.aiter_lines():
                    pass

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return time.perf_counter() - started


def scheduler_seconds(model: treeflash.LanguageModel, work: Sequence[Job], parallel: int) -> float:
    """Measure the seconds in which the scheduler has decoded all answers."""
    started = time.perf_counter()
    questions = [[{"role": "user", "content": job.question}] for job in work]
    options: Options = {**work[0].options, "stop_token_ids": (), "budget": 16}
    for _ in model.generate_many(questions, parallel=parallel, **options):
        pass
    return time.perf_counter() - started


def first_tokens(model: treeflash.LanguageModel, url: str, repeats: int) -> dict[str, float]:
    """Measure the median milliseconds to a short prompt's first token in both systems."""
    job = Job("Why is the sky blue?", 2)
    messages = [{"role": "user", "content": job.question}]
    options: Options = {**job.options, "budget": 16}
    api_times, http_times = [], []
    with httpx.Client(base_url=url, timeout=600) as client:
        for _ in range(repeats):
            started = time.perf_counter()
            next(model.stream(messages, **options))
            api_times.append(time.perf_counter() - started)
            started = time.perf_counter()
            with client.stream("POST", PATH, json={**job.body, "stream": True}) as response:
                for line in response.iter_lines():
                    if '"content":"' in line and '"content":""' not in line:
                        break
            http_times.append(time.perf_counter() - started)
    medians = {"api_ms": statistics.median(api_times), "http_ms": statistics.median(http_times)}
    medians["difference_ms"] = medians["http_ms"] - medians["api_ms"]
    return {name: round(1000 * value, 1) for name, value in medians.items()}


def throughput(
    model: treeflash.LanguageModel, url: str, work: Sequence[Job], clients: int, rounds: int
) -> dict[str, float]:
    """Measure the tokens per second of the scheduler and through HTTP, and their ratio."""
    times = []
    for _ in range(rounds):
        pair = (
            scheduler_seconds(model, work, clients),
            asyncio.run(http_seconds(url, work, clients)),
        )
        times.append(pair)
    tokens = sum(job.max_tokens for job in work)
    scheduler, http = (tokens / statistics.median(x) for x in zip(*times, strict=True))
    return {
        "clients": clients,
        "scheduler_tokens_per_s": round(scheduler, 1),
        "http_tokens_per_s": round(http, 1),
        "ratio": round(http / scheduler, 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", default="float32", help="(default: float32)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of throughput (default: 3)")
    parser.add_argument("--answers", type=int, default=16, help="answers per round (default: 16)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per answer (default: 32)")
    parser.add_argument("--repeats", type=int, default=20, help="first tokens (default: 20)")
    args = parser.parse_args(argv)
    model = treeflash.load(dtype=args.dtype)
    work = [Job(QUESTIONS[i % len(QUESTIONS)], args.tokens) for i in range(args.answers)]
    options = ("--budget", "16", "--prefix-cache-gb", "0")
    with server("--dtype", args.dtype, *options) as running:
        first = first_tokens(model, running.url, args.repeats)
        print(json.dumps({"first_token": first}), flush=True)
        for clients in args.clients:
            row = throughput(model, running.url, work, clients, args.rounds)
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
