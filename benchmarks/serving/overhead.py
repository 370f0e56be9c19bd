"""The cost of HTTP: throughput and time to the first token, with the server and without.

    python -m benchmarks.serving.overhead [--dtype float32]

Throughput is compared with the scheduler's, the time to the first token with the Python API's. Both
sides decode the same prompts with the same options, in turn, and the medians count. The results are
printed as one JSON object per line.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence

import httpx

import treeflash
from benchmarks.common import Parser, alternate_ms
from benchmarks.serving.load import PATH
from benchmarks.serving.servers import QUESTIONS, Job, server
from treeflash.cli.console import guarded
from treeflash.config import DTYPES
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
    with httpx.Client(base_url=url, timeout=600) as client:

        def ask_api() -> None:
            next(model.stream(messages, **options))

        def ask_server() -> None:
            with client.stream("POST", PATH, json={**job.body, "stream": True}) as response:
                for line in response.iter_lines():
                    if '"content":"' in line and '"content":""' not in line:
                        break

        api, http = alternate_ms([ask_api, ask_server], repeats)
    found = {"api_ms": api, "http_ms": http, "difference_ms": http - api}
    return {name: round(ms, 1) for name, ms in found.items()}


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


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__, json=False)
    options.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    options.add_numbers("--clients", [1, 4, 16], "clients at once")
    options.add_number("--rounds", 3, "rounds of throughput")
    options.add_number("--answers", 16, "answers per round")
    options.add_number("--tokens", 32, "tokens per answer")
    options.add_number("--repeats", 20, "first tokens")
    return options


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
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
