"""Whether memory stays flat: the most that was held, after each thousand of many generated tokens.

    python benchmarks/memory.py gsm8k.jsonl [--json FILE]

The same text of a thousand tokens, the first prompt's, is generated again and again, beyond its end
token. What one needs, the first needs too: `mb_beyond_first` is how much the peak grew after it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import Parser, at_least_one, show, write_json

from treeflash.cli.options import add_model_options, guarded, load_model
from treeflash.text.prompt import encode
from treeflash.text.prompt_file import read_rows

TEXT_TOKENS = 1000


@guarded
def main(argv=None) -> int:
    """Measure, print, write."""
    options = Parser(__doc__.splitlines()[0])
    options.add_argument("prompts", type=Path, metavar="FILE.jsonl", help="its first is used")
    options.add_argument("--texts", type=at_least_one, default=10, help="how many (10)")
    add_model_options(options)
    args = options.parse_args(argv)
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
