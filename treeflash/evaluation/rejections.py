"""Why the target's next token was not in the tree when an iteration ended."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np

from treeflash.decoding.loop import Step

Reason: TypeAlias = Literal["candidate", "child", "budget_limit", "block"]
REASONS: tuple[Reason, ...] = get_args(Reason)


def rejection_reason(step: Step) -> Reason | None:
    """The reason why the bonus token of an iteration was not drafted.

    Args:
        step: a step of the decode loop, with its table.

    Returns:
        - `block`: the accepted path reached the last depth;
        - `candidate`: its last token is not among the previous tokens of the next depth;
        - `child`: the bonus token is not among the K children of that last token;
        - `budget_limit`: it is in the table, but the tree had no room for it;
        - None: nothing was drafted, the text ended before the bonus token, or the accepted path
          reached the token limit, beyond which no tree is drafted.
    """
    if step.table is None or step.tree is None or step.path is None:
        return None
    if len(step.tokens) < len(step.path):
        return None
    accepted = step.tree.tokens[step.path[1:]]
    if len(accepted) == step.table.depths:
        return None if step.finish_reason == "length" else "block"
    row = 0
    for depth, token in enumerate(accepted):
        (rank,) = np.flatnonzero(step.table.tokens[depth, row] == token)[:1]
        row = int(step.table.next_row[depth, row, rank])
    if row < 0:
        return "candidate"
    children = step.table.tokens[len(accepted), row]
    possible = np.isfinite(step.table.log_probs[len(accepted), row])
    return "budget_limit" if step.tokens[-1] in children[possible] else "child"
