"""Draft trees as the page of the server reads them."""

from __future__ import annotations

from typing import Any

from treeflash.serving.completion import Event
from treeflash.text.tokenizer import Tokenizer


def draft_tree(tokenizer: Tokenizer, event: Event) -> dict[str, Any]:
    """What one iteration drafted and accepted.

    Returns:
        `iteration`; `seconds` that it took, with all texts of its batch; `tokens`, the texts of the
        committed tokens; and, for n nodes after the prefill, `nodes` (the texts of the drafted
        tokens, the root first), `parents` (indices, -1 for the root) and `path` (the indices of
        the accepted nodes).
    """
    step = event.chunk.step
    found: dict[str, Any] = {
        "iteration": event.iteration,
        "seconds": sum(step.seconds.values()),
        "tokens": [tokenizer.token_text(token) for token in event.chunk.token_ids],
    }
    if step.tree is not None and step.path is not None:
        found["nodes"] = [tokenizer.token_text(token) for token in step.tree.tokens.tolist()]
        found["parents"] = step.tree.parents.tolist()
        found["path"] = step.path.tolist()
    return found
