"""Whether memory stays flat: peak memory after each thousand generated tokens.

    python -m benchmarks.decoding.memory gsm8k.jsonl [--json FILE]

The first prompt is continued for a thousand tokens, ignoring stop tokens, again and again. Every
text needs as much memory as the first, so `mb_beyond_first`, the growth of the peak after it,
should stay near 0.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.common import Parser, at_least_one, show, write_json
from treeflash.cli.exit_status import guarded
from treeflash.cli.options import add_model_options, load_model
from treeflash.text.prompt import encode
from treeflash.text.prompt_file import read_rows

TEXT_TOKENS = 1000


def parser() -> Parser:
    """The command line."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument(
        "prompts", type=Path, metavar="FILE.jsonl", help="its first prompt is used"
    )
    options.add_argument(
        "--texts", type=at_least_one, default=10, help="number of texts (default: 10)"
    )
    add_model_options(options)
    return options


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    args = parser().parse_args(argv)
    model = load_model(args)
    rows: list[dict] = []
    first = tokens = 0
    ids = encode(model.tokenizer, read_rows(args.prompts)[0].turns[0])
    for _ in range(args.texts):
        tokens += len(model.generate(ids, max_tokens=TEXT_TOKENS, stop_token_ids=()).token_ids)
        held = model.backend.memory_bytes()
        first = first or held
        rows.append({"tokens": tokens, "mb": held / 1e6, "mb_beyond_first": (held - first) / 1e6})
    show("memory", rows)
    write_json(args.json, "memory", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
