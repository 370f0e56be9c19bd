"""The time of an iteration, part by part: phases, contexts, budgets, sampling, prefill.

    python -m benchmarks.components.iteration gsm8k.jsonl [--json FILE] [--plot FILE.png]

- `phases`: milliseconds of an iteration by phase, for every method. `outside` is the fraction spent
  outside the forward passes of target and drafter: building the tree, choosing tokens, accepting,
  committing. If a backend chooses tokens in its forward pass (MLX), `choose` is unknown and not
  part of `outside`.
- `verify`: a target forward pass by nodes of the tree and committed positions.
- `sampling`: an iteration with sampling at the nodes of drafted trees, relative to a greedy one.
- `prefill`: a prompt, relative to the framework's own forward pass over it.

All times are medians; the things compared take turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import (
    Parser,
    at_least_one,
    numbers,
    output_file,
    random_tree,
    show,
    write_json,
)
from treeflash.cli.exit_status import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.decoding.statistics import PHASES
from treeflash.decoding.text_session import TextSession
from treeflash.errors import ConfigError
from treeflash.language_model import LanguageModel
from treeflash.text.prompt import encode
from treeflash.text.prompt_file import read_rows

GREEDY = SamplingConfig()
SAMPLINGS = {
    "temperature 1": SamplingConfig(temperature=1.0),
    "temperature 1, top-p 0.9": SamplingConfig(temperature=1.0, top_p=0.9),
    "temperature 0.8, top-k 50, top-p 0.95": SamplingConfig(temperature=0.8, top_k=50, top_p=0.95),
}
PARTS = ("phases", "sampling", "prefill", "verify")
BUDGETS = (16, 64)
TOKENS = 64  # of a text whose iterations are timed


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument(
        "prompts", type=Path, metavar="FILE.jsonl", help="its first prompts are used"
    )
    options.add_argument("--limit", type=at_least_one, default=4, help="prompts (default: 4)")
    options.add_argument(
        "--repeats", type=at_least_one, default=7, help="calls per median (default: 7)"
    )
    options.add_argument(
        "--sizes",
        type=numbers,
        default=[2**n for n in range(10)],
        help="tree sizes, nodes (default: 1,2,4,...,512)",
    )
    options.add_argument(
        "--contexts",
        type=numbers,
        default=[64, 1024, 2048, 4096, 7600],
        help="committed positions (default: 64 to 7600)",
    )
    options.add_argument("--parts", default=",".join(PARTS), help=f"(default: {','.join(PARTS)})")
    options.add_argument("--plot", type=output_file, metavar="FILE.png", help="plot `verify`")
    add_model_options(options)
    return options


def alternate(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """The median milliseconds of each function, called in turn after one warm-up call each."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            own.append(1000 * (time.perf_counter() - start))
    return [median(own[1:]) for own in times]


def phase_rows(model: LanguageModel, prompts: list[list[int]]) -> list[dict]:
    """Time of an iteration by phase."""
    methods = ["ar"]
    if model.backend.drafter_config is not None:
        methods += ["dflash", "ddtree"] + ["treeflash"] * (model.backend.head is not None)
    rows = []
    for method in methods:
        for budget in BUDGETS if method in ("ddtree", "treeflash") else BUDGETS[:1]:
            config = DecodeConfig(method=method, budget=budget, max_tokens=TOKENS)
            steps = [s for ids in prompts for s in list(decode(model.backend, ids, config))[2:]]
            split = {
                f"{phase}_ms": 1000 * median(s.seconds.get(phase, 0.0) for s in steps)
                for phase in PHASES[1:]
            }
            size = round(median(len(s.tree) for s in steps))
            choose_ms = choice_ms(model, size)
            outside = split["tree_ms"] + split["commit_ms"] + (choose_ms or 0.0)
            rows.append(
                {"method": method, "budget": 1 if method == "ar" else budget}
                | split
                | {"choose_ms": choose_ms, "outside": outside / sum(split.values())}
            )
    return rows


def choice_ms(model: LanguageModel, nodes: int) -> float | None:
    """Time to choose tokens greedily from given logits; part of `verify`."""
    if model.backend.name != "cuda":
        return None
    import torch
    from treeflash_cuda.sampler import choose

    backend: Any = model.backend
    logits = torch.randn(nodes, backend.vocab_size).to(backend.target.dtype)
    logits = logits.to(backend.target.device)
    return alternate([lambda: choose(logits, GREEDY, None, backend.target.graphs)], 20)[0]


def verify_rows(model: LanguageModel, args: Any) -> list[dict]:
    """Time of a target forward pass by context and nodes."""
    backend, rng = model.backend, np.random.default_rng(0)
    rows = []
    for context in args.contexts:
        trees = [random_tree(backend.vocab_size, size) for size in args.sizes]
        with TextSession(backend, capacity=context + max(args.sizes)) as text:
            text.extend(rng.integers(0, backend.vocab_size, context).tolist())
            calls = [lambda v=text, t=tree: v.verify(t) for tree in trees]
            for size, verify_ms in zip(args.sizes, alternate(calls, args.repeats), strict=True):
                rows.append({"context": context, "nodes": size, "verify_ms": verify_ms})
    return rows


def sampling_rows(model: LanguageModel, prompts: list[list[int]], repeats: int) -> list[dict]:
    """Time of an iteration under different sampling settings, over the same drafted trees."""
    backend = model.backend
    method = model.best_method
    rows = []
    for budget in BUDGETS:
        config = DecodeConfig(method=method, budget=budget, max_tokens=TOKENS)
        times = []
        for ids in prompts:
            steps = list(decode(backend, ids, config))
            half = len(steps) // 2
            written = [token for step in steps[:half] for token in step.tokens]
            tree = steps[half].tree
            draft_ms = 1000 * median(s.seconds.get("draft", 0.0) for s in steps[1:])
            with TextSession(backend, capacity=len(ids) + TOKENS + budget) as text:
                text.extend([*ids, *written[:-1]])
                seeds = count()  # the noise of one seed would be kept
                calls = [lambda v=text, t=tree: v.verify(t)] + [
                    lambda v=text, t=tree, s=sampling, n=seeds: v.verify(
                        t, replace(s, seed=next(n))
                    )
                    for sampling in SAMPLINGS.values()
                ]
                times.append([draft_ms + ms for ms in alternate(calls, repeats)])
        greedy, *others = (median(own) for own in zip(*times, strict=True))
        for name, ms in zip(SAMPLINGS, others, strict=True):
            rows.append({"sampling": name, "budget": budget, "of_greedy": ms / greedy})
    return rows


def prefill_rows(model: LanguageModel, contexts: list[int], repeats: int) -> list[dict]:
    """Time of a prefill, relative to the framework's own forward pass as it loads the model."""
    backend, rng = model.backend, np.random.default_rng(0)
    own = framework_forward(model)

    def prefill(ids: list[int]) -> None:
        with TextSession(backend, drafts=backend.drafter is not None, capacity=len(ids)) as text:
            text.extend(ids)

    rows = []
    for length in contexts:
        ids = rng.integers(0, backend.vocab_size, length).tolist()
        mine_ms, own_ms = alternate(
            [
                lambda ids=ids: prefill(ids),
                lambda ids=ids: own(ids),
            ],
            repeats,
        )
        rows.append({"tokens": length, "prefill_ms": mine_ms, "of_framework": mine_ms / own_ms})
    return rows


def framework_forward(model: LanguageModel) -> Callable[[list[int]], int]:
    """A function from a prompt to the most probable next token, computed by the framework."""
    backend: Any = model.backend
    if backend.name == "mlx":
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        other, _ = load_model(model.folder)
        other.set_dtype(getattr(mx, backend.dtype))

        def run(ids: list[int]) -> int:
            cache = make_prompt_cache(other)
            for first in range(0, len(ids) - 1, 512):  # like mlx-lm's generate
                other(mx.array([ids[first : min(first + 512, len(ids) - 1)]]), cache=cache)
                mx.eval([c.state for c in cache])
            return int(other(mx.array([ids[-1:]]), cache=cache)[0, -1].argmax())

        return run
    import torch
    from transformers import AutoModelForCausalLM

    dtype, device = backend.target.dtype, backend.target.device
    other = AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype).to(device).eval()

    @torch.inference_mode()
    def run(ids: list[int]) -> int:
        logits = other(torch.tensor([ids], device=device), logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    return run


def draw(rows: list[dict], caption: str, path: Path) -> None:
    """Plot verify time by nodes for each context, and by context for some sizes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    by_nodes, by_context = figure.subplots(1, 2)
    contexts = sorted({row["context"] for row in rows})
    sizes = sorted({row["nodes"] for row in rows})
    for axis, x, lines, name in (
        (by_nodes, "nodes", contexts, "context"),
        (by_context, "context", sizes[::3], "nodes"),
    ):
        for value in lines:
            own = [row for row in rows if row[name] == value]
            axis.plot(
                [r[x] for r in own],
                [r["verify_ms"] for r in own],
                marker="o",
                markersize=3,
                label=f"{value}",
            )
        axis.set(xlabel=x, ylabel="ms per target forward pass", ylim=(0, None))
        axis.legend(title=name, fontsize="small")
    figure.suptitle(caption, fontsize="small")
    figure.savefig(path)


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"--parts has no {unknown[0]!r}; choose from {', '.join(PARTS)}")
    if args.plot is not None and "verify" not in parts:
        raise ConfigError("--plot needs the part verify; add it to --parts")
    model = load_model(args)
    if model.backend.name not in ("cuda", "mlx"):
        raise ConfigError("--backend must be cuda or mlx: others have no framework to compare with")
    prompts = [encode(model.tokenizer, row.turns[0]) for row in read_rows(args.prompts)]
    prompts = prompts[: args.limit]
    measure: dict[str, Callable[[], list[dict]]] = {
        "phases": lambda: phase_rows(model, prompts),
        "sampling": lambda: sampling_rows(model, prompts, args.repeats),
        "prefill": lambda: prefill_rows(model, args.contexts, max(3, args.repeats // 2)),
        "verify": lambda: verify_rows(model, args),
    }
    results = {part: measure[part]() for part in parts}
    backend = model.backend
    where = {"backend": backend.name, "device": backend.device, "dtype": backend.dtype}
    for name, rows in results.items():
        show(f"{name}, {' '.join(where.values())}", rows)
    if args.plot is not None:
        draw(results["verify"], " ".join(where.values()), args.plot)
    write_json(args.json, "iteration", where | results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
