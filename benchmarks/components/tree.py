"""Time of the NumPy core in an iteration: table, tree, ancestor mask, acceptance.

    python -m benchmarks.components.tree [--json FILE]

Goals: building a tree takes at most 0.3 ms with 64 nodes and 2 ms with 1024.
"""

from __future__ import annotations

import numpy as np

from benchmarks.common import Parser, at_least_one, median_ms, show, write_json
from treeflash.decoding.acceptance import accept
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, build_tree

DEPTHS, ROWS, CHILDREN = 15, 16, 16  # block size 16, M = K = 16
BUDGETS = (16, 64, 256, 1024)
GOALS_MS = {64: 0.3, 1024: 2.0}
# Standard deviation of the logits, from a drafter that knows nothing to a confident one.
PEAKEDNESS = {"flat": 0.0, "soft": 1.0, "usual": 3.0, "sharp": 8.0}
POOL = 24  # tokens per depth: two of three children are previous tokens of the next depth


def candidates(scale: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random output of an AR head: previous tokens, children and their log probabilities."""
    rng = np.random.default_rng(seed)
    pools = np.array([rng.permutation(50_000)[:POOL] for _ in range(DEPTHS)], np.int32)
    logits = -np.sort(-rng.normal(0, scale, (DEPTHS, ROWS, 1000)))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = rng.permuted(np.repeat(pools[:, None], ROWS, 1), axis=-1)[..., :CHILDREN]
    return pools[:-1, :ROWS], tokens, log_probs[..., :CHILDREN].astype(np.float32)


def choices(tree: DraftTree) -> np.ndarray:
    """The choices of a target that agrees with the first child of every node."""
    chosen = np.full(len(tree), -1, np.int32)
    for node in range(len(tree) - 1, 0, -1):
        chosen[tree.parents[node]] = tree.tokens[node]
    return chosen


def main() -> None:
    """Measure, print, write."""
    parser = Parser(__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument(
        "--repeats", type=at_least_one, default=300, help="calls per median (default: 300)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed for the tables (default: 0)"
    )
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("argument --seed: must be 0 or more")

    rows = []
    for name, scale in PEAKEDNESS.items():
        previous, tokens, log_probs = candidates(scale, args.seed)
        table = TransitionTable.from_candidates(previous, tokens, log_probs)
        table_ms = median_ms(
            lambda arrays=(previous, tokens, log_probs): TransitionTable.from_candidates(*arrays),
            args.repeats,
        )
        for budget in BUDGETS:
            tree = build_tree(table, 0, budget)
            chosen = choices(tree)
            build_ms = median_ms(lambda t=table, b=budget: build_tree(t, 0, b), args.repeats)
            goal = GOALS_MS.get(budget)
            rows.append(
                {
                    "table": name,
                    "budget": budget,
                    "depth": int(tree.depths.max()),
                    "from_candidates_ms": table_ms,
                    "build_tree_ms": build_ms,
                    "goal_ms": goal,
                    "of_goal": build_ms / goal if goal else None,
                    "ancestor_mask_ms": median_ms(tree.ancestor_mask, args.repeats),
                    "accept_ms": median_ms(lambda t=tree, c=chosen: accept(t, c), args.repeats),
                }
            )
    for row in rows:
        smallest = next(r for r in rows if r["table"] == row["table"])
        row["of_budget_16"] = row["build_tree_ms"] / smallest["build_tree_ms"]
    show(f"Medians of {args.repeats} calls, milliseconds", rows)
    settings = {"depths": DEPTHS, "top_m": ROWS, "top_k_children": CHILDREN}
    write_json(
        args.json, "tree", {**settings, "repeats": args.repeats, "seed": args.seed, "rows": rows}
    )


if __name__ == "__main__":
    main()
