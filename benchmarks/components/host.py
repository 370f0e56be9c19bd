"""Time in which Python builds a target forward pass on MLX, which evaluates it afterwards.

    python -m benchmarks.components.host [--layers 36] [--nodes 1,16,64] [--json FILE]

The target is a Qwen3 of random weights so narrow that the device does next to nothing: the time of
the host depends on the layers, not on their width. The row `mlx-lm` has its own cache and no hooks.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Parser, at_least_one, numbers, random_tree, show, write_json
from treeflash.cli.exit_status import guarded
from treeflash.testing.models import write_target


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument(
        "--layers", type=at_least_one, default=36, help="of the target (default: 36)"
    )
    options.add_argument(
        "--nodes", type=numbers, default=[1, 16, 64], help="of a tree (default: 1,16,64)"
    )
    options.add_argument(
        "--repeats", type=at_least_one, default=100, help="passes per median (default: 100)"
    )
    return options


def timed(build: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median and shortest time, without that of the evaluation."""
    import mlx.core as mx

    times = []
    for _ in range(repeats + 5):
        started = time.perf_counter()
        result = build()
        times.append(time.perf_counter() - started)
        mx.eval(result)
    return {"host_ms": 1000 * median(times[5:]), "shortest_ms": 1000 * min(times[5:])}


def rows(layers: int, sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Times by system and nodes; a device that starts early would count towards them."""
    import mlx.core as mx
    from mlx_lm import utils
    from mlx_lm.models.cache import make_prompt_cache
    from treeflash_mlx.state import State
    from treeflash_mlx.target import Target
    from treeflash_mlx.verifier import Verifier

    mx.set_default_device(mx.Device(mx.cpu))
    with tempfile.TemporaryDirectory() as folder:
        write_target(Path(folder), "qwen3", seed=1, layers=layers)
        target = Target(Path(folder), mx.float32, None)
        theirs, _ = utils.load_model(Path(folder))
    verifier, cache, token = Verifier(target, None), make_prompt_cache(theirs), mx.array([[1]])
    found = [{"system": "mlx-lm", "nodes": 1} | timed(lambda: theirs(token, cache=cache), repeats)]
    for size in sizes:
        work = [(State(target.new_key_values(200), None), random_tree(target.vocab_size, size))]
        times = timed(lambda work=work: verifier._forward(work), repeats)
        found.append({"system": "treeflash", "nodes": size} | times)
    return found


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    found = rows(args.layers, args.nodes, args.repeats)
    show("time of the host for a pass", found)
    write_json(args.json, "host", {"layers": args.layers, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
