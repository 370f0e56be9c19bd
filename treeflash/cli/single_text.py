"""Decodes one prompt for the command line: prints the text, the draft trees and the summary."""

from __future__ import annotations

import json
from dataclasses import replace

from rich.console import Console

from treeflash.cli.compare import compare, warm_up
from treeflash.cli.exit_status import INTERRUPTED
from treeflash.cli.explain import explain
from treeflash.cli.summary import summarise
from treeflash.text.stream import Stream
from treeflash.text.tokenizer import Tokenizer

NOT_EQUAL = 1


def run_text(
    stream: Stream,
    tokenizer: Tokenizer,
    console: Console,
    *,
    as_json: bool,
    compared: bool,
    explained: int,
) -> int:
    """Decode one text, print it, and return the exit status.

    Args:
        stream: the text, not started.
        tokenizer: the target's.
        console: where the summary and the trees go.
        as_json: print one JSON object instead of the text.
        compared: also decode plainly, and compare.
        explained: number of iterations whose trees are drawn.
    """
    if compared:
        warm_up(stream)
    shown = 0
    try:
        for chunk in stream:
            if not as_json:
                print(chunk.text, end="", flush=True)
                shown += len(chunk.text)
    except KeyboardInterrupt:
        pass  # the generation has what was decoded, and this finish reason
    except Exception:
        if shown:
            print(flush=True)  # the error gets a line of its own
        raise
    generation = stream.generation()
    if not as_json:
        print(generation.text[shown:], flush=True)
    for number, step in enumerate(stream.steps[1 : explained + 1], 1):
        console.print(explain(step, number, tokenizer))
    code = INTERRUPTED if generation.finish_reason == "interrupted" else 0
    if compared and code == 0:
        try:
            generation = replace(generation, compare=compare(generation, stream))
        except KeyboardInterrupt:
            console.print("interrupted while decoding plainly; not compared")
            code = INTERRUPTED
    if as_json:
        print(json.dumps(generation.to_dict()))
    console.print(summarise(generation), markup=False)
    if generation.compare is not None and not generation.compare.explained:
        code = NOT_EQUAL
    return code
