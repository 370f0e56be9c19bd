"""Benchmarks, run from the repository's root: `python -m benchmarks.performance`.

- `decoding`: whole texts: speed and block efficiency of methods, half precision, memory.
- `components`: the parts of an iteration: phases, trees, the AR head.
- `peers`: other systems beside treeflash.
- `throughput`: many texts at once, beside the batched generation of other packages.
- `gpu`: the parts of an iteration on a GPU, with random weights.
- `performance`: everything that `docs/performance.md` shows.
- `families`: the table of model families in `docs/families.md`.
"""
