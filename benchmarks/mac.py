"""What a Mac makes of a target and its drafter: one command, one JSON file, one plot.

    python -m benchmarks.mac --target FOLDER_OR_ID [--json FILE] [--plot FILE.png]

- `verify`: milliseconds of a target forward pass over a tree, by nodes and committed positions. The
  steps by nodes show which kernels the GPU chooses, the growth by positions the cost of attention.
- `host`: milliseconds in which Python builds a pass over one token, which MLX evaluates afterwards.
- `iterations`: the decode loop by phase, medians. Work that a phase leaves running on the device
  counts towards the next phase that waits for it.
- `speed`: tokens per second of every method, and of mlx-lm's `generate` with the same weights.

It runs wherever MLX does.
"""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import (
    Parser,
    at_least_one,
    machine,
    median_ms,
    numbers,
    output_file,
    random_tree,
    show,
    write_json,
)
from treeflash.cli.exit_status import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import METHODS, DecodeConfig, Method
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.loop import Step
from treeflash.decoding.statistics import PHASES
from treeflash.decoding.text_session import TextSession
from treeflash.errors import ConfigError
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import encode

PROMPTS = (
    "Natalia sold clips to 48 of her friends in April, and half as many in May. How many clips did "
    "she sell in both months? Reason step by step.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "Why is the sky blue? Answer in one paragraph.",
)


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument(
        "--sizes",
        type=numbers,
        default=[1, 2, 4, 5, 8, 10, 12, 16, 24, 32, 48, 64],
        help="tree sizes, nodes (default: 1,2,4,5,8,10,12,16,24,32,48,64)",
    )
    options.add_argument(
        "--contexts",
        type=numbers,
        default=[64, 1024, 4096],
        help="committed positions (default: 64,1024,4096)",
    )
    options.add_argument(
        "--repeats", type=at_least_one, default=10, help="calls per median (default: 10)"
    )
    options.add_argument(
        "--max-tokens", type=at_least_one, default=128, help="new tokens (default: 128)"
    )
    options.add_argument("--plot", type=output_file, metavar="FILE.png", help="plot `verify`")
    add_model_options(options)
    options.set_defaults(backend="mlx")
    return options


def verify_rows(backend: Any, args: Any) -> list[dict[str, Any]]:
    """Time of a target forward pass by context and nodes."""
    rows = []
    for context in args.contexts:
        text = TextSession(backend, capacity=context + max(args.sizes))
        text.extend([token % backend.vocab_size for token in range(context)])
        for size in args.sizes:
            tree = random_tree(backend.vocab_size, size)
            verify_ms = median_ms(lambda v=text, t=tree: v.verify(t), args.repeats)
            rows.append({"context": context, "nodes": len(tree), "verify_ms": verify_ms})
        text.close()
    return rows


def host_rows(backend: Any, repeats: int) -> list[dict[str, Any]]:
    """Time in which a pass of a single token is built."""
    import mlx.core as mx

    target = backend.target
    text = target.new_key_values(repeats + 64)
    token = mx.array([[1]], mx.int32)
    mx.eval(target.forward(token, [text], ()))

    def build() -> None:
        target.forward(token, [text], ())

    return [{"layers": len(target.layers), "host_ms": median_ms(build, repeats)}]


def methods(model: LanguageModel) -> list[Method]:
    """The methods that the pair supports."""
    if model.backend.drafter is None:
        return ["ar"]
    return [m for m in METHODS if model.backend.head or not m.startswith("treeflash")]


def timed(run: Any) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def decoded(model: LanguageModel, prompts: list[list[int]], args: Any) -> tuple[Any, Any]:
    """The phases of an iteration and the tokens per second, by method."""
    iterations, speed = [], []
    for method in methods(model):
        config = DecodeConfig(
            method=method,
            max_tokens=args.max_tokens,
            stop_token_ids=frozenset(model.tokenizer.stop_token_ids),
        )

        def run(prompt: list[int], config: DecodeConfig = config) -> list[Step]:
            scheduler = Scheduler(model.backend, budgets=model.adaptive_budgets)
            scheduler.submit(Request(prompt_ids=prompt, config=config))
            steps = []
            while scheduler.busy:
                for _, event in scheduler.step():
                    if isinstance(event, Exception):
                        raise event
                    steps.append(event)
            return steps

        run(prompts[0])  # warms up
        answers = [timed(lambda ids=ids: run(ids)) for ids in prompts]
        steps = [step for answer, _ in answers for step in answer]
        tokens = sum(len(step.tokens) for step in steps)
        per_s = tokens / sum(seconds for _, seconds in answers)
        speed.append({"system": "treeflash", "method": method, "tokens_per_s": per_s})
        seconds = [step.seconds for step in steps if "prefill" not in step.seconds]
        split = {f"{x}_ms": 1000 * median(s.get(x, 0.0) for s in seconds) for x in PHASES[1:]}
        nodes = median(len(step.tree) for step in steps if step.tree is not None)
        iterations.append({"method": method, "nodes": nodes} | split)
    return iterations, speed


def peer(model: LanguageModel, prompts: list[list[int]], args: Any) -> dict[str, Any]:
    """mlx-lm's own loop over the same weights."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    backend: Any = model.backend
    stop = set(model.tokenizer.stop_token_ids)

    def run(prompt: list[int]) -> int:
        tokens = 0
        for token, _ in generate_step(
            mx.array(prompt), backend.target.model, max_tokens=args.max_tokens
        ):
            tokens += 1
            if token in stop:
                break
        return tokens

    run(prompts[0])  # warms up
    answers = [timed(lambda ids=ids: run(ids)) for ids in prompts]
    per_s = sum(tokens for tokens, _ in answers) / sum(seconds for _, seconds in answers)
    return {"system": "mlx-lm", "method": "generate", "tokens_per_s": per_s}


def draw(rows: list[dict[str, Any]], caption: str, path: Path) -> None:
    """Plot the time of a pass by nodes, a line for each context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=110, layout="constrained")
    axis = figure.subplots()
    for context in dict.fromkeys(row["context"] for row in rows):
        own = [row for row in rows if row["context"] == context]
        x, y = [row["nodes"] for row in own], [row["verify_ms"] for row in own]
        axis.plot(x, y, marker="o", markersize=3, label=f"{context} positions")
    axis.set(xlabel="nodes", ylabel="target forward pass, ms", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.suptitle(caption, fontsize="small")
    figure.savefig(path)


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    if min(*args.sizes, *args.contexts) < 1:
        raise ConfigError("--sizes and --contexts: every number must be 1 or more")
    if args.plot and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; pip install 'treeflash[report]'")
    model = load_model(args)
    backend: Any = model.backend
    if backend.name != "mlx":
        raise ConfigError("this benchmark measures the mlx backend")
    prompts = [encode(model.tokenizer, prompt) for prompt in PROMPTS]
    iterations, speed = decoded(model, prompts, args)
    results = {
        "verify": verify_rows(backend, args),
        "host": host_rows(backend, args.repeats),
        "iterations": iterations,
        "speed": [*speed, peer(model, prompts, args)],
    }
    where = {"device": backend.device_name, "dtype": backend.dtype, "target": args.target}
    show("device and model", [where])
    for name, rows in results.items():
        show(name, rows)
    write_json(args.json, "mac", where | {"repeats": args.repeats} | results)
    if args.plot:
        draw(results["verify"], f"{machine()['cpu']}, {backend.dtype}", args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
