"""Benchmarks, run from the repository's root: `python -m benchmarks.performance`.

- `performance` runs `peers` and `decoding` and writes `docs/performance.md`.
- `decoding.methods`: block efficiency, speed and time by phase, by method, budget and prompt set.
- `decoding.budgets`: the budget `auto` against fixed sizes, by prompt set.
- `decoding.half_precision`: where drafting diverges from plain decoding in half precision.
- `decoding.quality`: divergence and perplexity of weights of few bits.
- `decoding.memory`: memory of the loaded pair, of a sequence, and of many sequences in a row.
- `peers`: other systems with the same weights and prompts, each in its own process; one prompt
  after the other, or many at once.
- `serving.load`: the HTTP server under load, whose answers are compared with plain decoding.
- `device_report`: whether a GPU or a Mac does everything right, and how fast: one file to send.
- `launches`: the operations and bytes of an iteration on a GPU, counted without one.
- `kernels`: what the Triton kernels take of each GPU, compiled without one.
- `metal_sources`: the sources of the MLX backend's Metal kernels, to compile them on a Mac.
- `published`: accepted lengths of a drafter beside the ones of its paper.
- `pictures`: the pictures of README, from a recorded run.
- `families`: the table of model types in `docs/families.md`.
- `smollm2`: how the bundled drafter was trained.
"""
