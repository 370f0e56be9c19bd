"""What trees cost a target with recurrent layers: by nodes, beside as many tokens of a prompt.

    python -m benchmarks.components.hybrid [--backend cuda] [--device cpu] [--json FILE]

The target has the shape of Qwen3.5 (three gated delta nets to one attention layer, heads of 128
channels), scaled down, with random weights. `tree_ms` is a forward pass over a random tree,
`chunk_ms` one over as many tokens of a prompt, `commit_ms` the commit of a longest path.
`mixer_tree_ms` and `mixer_chunk_ms` are the times of the recurrent layers alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import Parser, at_least_one, random_tree, show, write_json
from treeflash.cli.exit_status import guarded
from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.registry import loader

SIZES = (1, 4, 8, 16, 32, 64)
PROMPT = 256
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}


def write_target(folder: Path, dtype: str) -> None:
    """Write the target, with the settings that both frameworks read."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3_5Config

    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=SHAPE | {"full_attention_interval": 4})
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    path = folder / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved.get("text_config", saved)["full_attention_interval"] = 4
    path.write_text(json.dumps(saved), encoding="utf-8")


class _MlxHook:
    """Times the calls of one module of MLX, and evaluates before and after each."""

    def __init__(self, module: Any, seconds: list[float]) -> None:
        """Give the module a class of its own."""
        import mlx.core as mx

        kind = type(module)

        def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            mx.eval(x)
            start = time.perf_counter()
            output = kind.__call__(self, x, *args, **kwargs)
            mx.eval(output)
            seconds.append(time.perf_counter() - start)
            return output

        self.module, self.kind = module, kind
        module.__class__ = type(kind.__name__, (kind,), {"__call__": call})

    def remove(self) -> None:
        """Give it its class back."""
        self.module.__class__ = self.kind


def synchronise(backend: Backend) -> None:
    """Wait for what MLX still computes."""
    if backend.name == "mlx":
        import mlx.core as mx

        mx.synchronize()


@contextmanager
def mixer_times(backend: Backend) -> Iterator[list[float]]:
    """Seconds of each call of a recurrent layer."""
    seconds: list[float] = []
    model = getattr(getattr(backend, "target", None), "model", None)
    hooks = []
    if hasattr(model, "named_modules") and hasattr(model, "register_forward_hook"):
        started: list[float] = []
        for name, module in model.named_modules():
            if name.endswith("linear_attn"):
                before = module.register_forward_pre_hook(
                    lambda *_: started.append(time.perf_counter())
                )
                after = module.register_forward_hook(
                    lambda *_: seconds.append(time.perf_counter() - started.pop())
                )
                hooks += [before, after]
    elif backend.name == "mlx":
        for name, module in model.named_modules():
            if name.endswith("linear_attn"):
                hooks.append(_MlxHook(module, seconds))
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def rows(backend: Backend, repeats: int) -> list[dict[str, Any]]:
    """A row for each size."""
    rng = np.random.default_rng(0)
    found = []
    with TextSession(backend, capacity=PROMPT + 2 * max(SIZES) * (repeats + 1)) as text:
        text.extend(rng.integers(0, backend.vocab_size, PROMPT).tolist())
        text.state.snapshot()
        for size in SIZES:
            tree = random_tree(backend.vocab_size, size)
            path = longest_path(tree)
            times: dict[str, list[float]] = {}

            def timed(name: str, call: Any, *args: Any, times: Any = times) -> None:
                with mixer_times(backend) as mixers:
                    start = time.perf_counter()
                    call(*args)
                    synchronise(backend)
                    times.setdefault(name, []).append(time.perf_counter() - start)
                times.setdefault(f"mixer_{name}", []).append(sum(mixers))

            for _ in range(repeats + 1):
                timed("tree", text.logits, tree)
                timed("commit", text.commit, path)
                text.state.truncate(PROMPT)
                timed("chunk", text.extend, tree.tokens.tolist())
                text.state.truncate(PROMPT)
            row: dict[str, Any] = {"nodes": size}
            for name in ("tree", "chunk", "commit", "mixer_tree", "mixer_chunk"):
                row[f"{name}_ms"] = 1000 * median(times[name][1:])
            found.append(row | {"state_mb": text.state.nbytes / 1e6})
    return found


def longest_path(tree: DraftTree) -> np.ndarray:
    """(a,) int32 nodes from the root to the deepest one."""
    deepest = int(tree.depths.argmax())
    return np.flatnonzero(tree.ancestor_mask()[deepest]).astype(np.int32)


@guarded
def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("--backend", default="cuda", help="cuda or mlx (default: cuda)")
    options.add_argument("--device", help="as for generate")
    options.add_argument("--dtype", default="float32", help="of the weights (default: float32)")
    options.add_argument("--repeats", type=at_least_one, default=9, help="(default: 9)")
    args = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        write_target(Path(folder), args.dtype)
        config = LoadConfig(device=args.device, dtype=args.dtype)
        measured = rows(loader(args.backend)(Path(folder), None, config), args.repeats)
    show("trees on recurrent layers", measured)
    write_json(args.json, "hybrid", {"rows": measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
