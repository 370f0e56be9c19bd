"""Memory: of the loaded pair, of a sequence by length, and whether it stays flat.

    python -m benchmarks.decoding.memory gsm8k.jsonl [--json FILE]

- `sequence`: the memory that a sequence of some tokens takes on the device, in MiB.
- `peak`: the most memory that was held until then, in MiB: after loading, and after each sequence.
  The first prompt is continued for `--max-tokens` tokens, ignoring stop tokens, again and again.
  Every sequence needs as much memory as the first, so the peak should stay where the first left it.
  On a GPU this is the memory of tensors, with all that is set aside for keys and values; on a CPU
  it is the memory of the process.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.common import Parser, Row, command, describe, publish, read_prompts
from treeflash.cli.options import add_model_options, load_model

MIB = 2**20


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    options.add_argument(
        "prompts", type=Path, metavar="FILE.jsonl", help="a prompt set; its first prompt is used"
    )
    options.add_number("--sequences", 4, "sequences to decode")
    options.add_number("--max-tokens", 500, "new tokens of each")
    options.add_numbers("--lengths", [1000, 4000, 8000], "tokens of a sequence")
    add_model_options(options)
    return options


def peak_bytes(backend: Any) -> int:
    """Return the most memory that this process has held on the devices of a pair."""
    if backend.name == "mlx":
        import mlx.core as mx

        return int(mx.get_peak_memory())
    if backend.name == "cuda":
        import torch

        return sum(torch.cuda.max_memory_allocated(x) for x in set(backend.target.devices))
    import resource  # POSIX only, and only needed here

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@command(parser)
def main(args: Namespace) -> int:
    """Measure, print, write."""
    model = load_model(args)
    backend: Any = model.backend
    drafts = backend.drafter is not None
    sequence = [
        {"tokens": length, "mib": backend.state_nbytes(length, drafts=drafts) / MIB}
        for length in args.lengths
    ]
    peak: list[Row] = [{"after": "loading", "mib": peak_bytes(backend) / MIB}]
    (ids,) = read_prompts(model.tokenizer, args.prompts, 1)
    for number in range(1, args.sequences + 1):
        model.generate(ids, max_tokens=args.max_tokens, stop_token_ids=())
        peak.append({"after": f"sequence {number}", "mib": peak_bytes(backend) / MIB})
    about = describe(backend) | {"max_tokens": args.max_tokens}
    return publish(args, about, sequence=sequence, peak=peak)


if __name__ == "__main__":
    sys.exit(main())
