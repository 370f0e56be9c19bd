"""What draft trees cost on the recurrent layers of a target in the shape of Qwen3.5, by nodes.

    python -m benchmarks.components.recurrence [--json FILE]

The target is random and scaled down: heads, channels and layers are as many as fit a small machine,
head sizes those of published models (128), with three gated delta nets to each attention layer. MLX
alone.

- `tree`: a target forward pass over a draft tree, ms.
- `chunk`: one over as many tokens of a prompt.
- `mixer, tree` and `mixer, chunk`: one gated delta net in such passes.
- `commit`: the states of all layers after a path, ms.

All times are medians; the things compared take turns.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import Parser, at_least_one, numbers, random_tree, show, write_json
from treeflash.cli.exit_status import guarded
from treeflash.config import LoadConfig
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree

SIZES = "1,4,8,16,32,64"
VOCAB = 2048
SHAPE = {
    "model_type": "qwen3_5_text",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "vocab_size": VOCAB,
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("--nodes", type=numbers, default=SIZES, help=f"default: {SIZES}")
    options.add_argument("--repeats", type=at_least_one, default=9)
    return options


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    import mlx.core as mx
    from treeflash_mlx.backend import load

    options = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        write_target(Path(folder))
        backend = load(Path(folder), None, LoadConfig(dtype="float32"))
    rng = np.random.default_rng(0)
    rows = []
    with TextSession(backend, capacity=4000) as text:
        text.extend(rng.integers(0, VOCAB, 64).tolist())
        states = text.state.key_values.states()
        for nodes in options.nodes:
            tree = random_tree(VOCAB, nodes)
            chunk = DraftTree.chain(tree.tokens)
            path = np.flatnonzero(tree.ancestor_mask()[-1]).astype(np.int32)

            def commit(tree: DraftTree = tree, path: Any = path) -> float:
                """Only the states: keys and values are in place."""
                text.logits(tree)
                storage = text.state.key_values.storage
                before = time.perf_counter()
                storage.states.commit({0: path}, 1)
                mx.eval(storage.states.arrays)
                taken = time.perf_counter() - before
                storage.states.replace(0, 1, states)
                return taken

            ways: dict[str, Callable[[], float]] = {
                "tree": timed(lambda tree=tree: text.logits(tree)),
                "chunk": timed(partial(prefill, backend, text, chunk)),
                "mixer, tree": timed(mixer(backend, text, tree, new=False)),
                "mixer, chunk": timed(mixer(backend, text, chunk, new=True)),
                "commit": commit,
            }
            rows.append(
                {
                    "nodes": len(tree),
                    "depth": int(tree.depths.max()),
                    **turns(ways, options.repeats),
                }
            )
    show("Milliseconds, by nodes", rows)
    if options.json:
        write_json(options.json, {"recurrence": rows})
    return 0


def write_target(folder: Path) -> None:
    """A random target, as mlx-lm would convert it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3_5

    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(json.loads(json.dumps(SHAPE))))
    mx.random.seed(0)
    weights = {
        name: mx.random.normal(x.shape) * x.shape[-1] ** -0.5 if x.ndim > 1 else x
        for name, x in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")


def prefill(backend: Any, text: TextSession, chunk: DraftTree) -> None:
    """A forward pass over new tokens, none of which is committed."""
    import mlx.core as mx

    mx.eval(backend.verifier._forward([(text.state, chunk)], new=True))


def mixer(backend: Any, text: TextSession, tree: DraftTree, *, new: bool) -> Callable[[], None]:
    """A call of the first recurrent layer's mixer in such a pass."""
    import mlx.core as mx
    from treeflash_mlx.recurrent_states import RecurrentCache
    from treeflash_mlx.tree_hooks import TreePass

    target = backend.target
    storage = text.state.key_values.storage
    tree_pass = TreePass.of(
        [tree], [text.length], storage.columns - 1, solve=None if new else target.solve
    )
    inputs = mx.random.normal((1, len(tree), SHAPE["hidden_size"]))

    def run() -> None:
        paths = None if tree_pass is None else tree_pass.paths
        cache = RecurrentCache(storage.states, 0, paths, target.hooks.reads)
        with target.hooks.forward_pass(tree_pass, capture=False):
            output = target.layers[0].linear_attn(inputs, None, cache)
        mx.eval(output)

    return run


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """The seconds of a call."""

    def run() -> float:
        before = time.perf_counter()
        call()
        return time.perf_counter() - before

    return run


def turns(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, which take turns; a first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + repeats):
        for name, run in ways.items():
            found[name].append(run())
    return {name: round(1e3 * median(seconds[1:]), 2) for name, seconds in found.items()}


if __name__ == "__main__":
    sys.exit(main())
