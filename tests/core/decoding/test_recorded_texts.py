"""The budget `auto` on recorded drafts of the default pair, by the clock of a stub.

`recorded_trees.json` has the drafter's tree at every position of texts of 96 tokens, by prompt set:
for each node after the root its parent (one hexadecimal digit) and the percentage of its path (two
digits), then a point and the nodes that the target accepts. Copies of the text are left out.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from treeflash.decoding.adaptive_budget import AdaptiveBudget
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import SIZES, VerifyCosts

RECORDED = json.loads((Path(__file__).parent / "recorded_trees.json").read_text())
NODES = 12
LENGTH = 100


def parse(record: str) -> tuple[DraftTree, np.ndarray]:
    """The tree of a position, and the (a,) nodes that the target accepts."""
    nodes, path = record.split(".")
    parents = [-1, *(int(digit, 16) for digit in nodes[::3])]
    percents = [100, *(int(nodes[i + 1 : i + 3]) for i in range(0, len(nodes), 3))]
    tree = DraftTree.from_parents(np.zeros(len(parents), np.int32), np.array(parents, np.int32))
    log_probs = np.minimum(np.log(np.array(percents) / 100), 0.0)
    for node, parent in enumerate(parents[1:], 1):  # rounding must not rank it before its parent
        log_probs[node] = min(log_probs[node], log_probs[parent])
    made = DraftTree(tree.tokens, tree.parents, tree.depths, log_probs)
    return made, np.array([0, *(int(digit, 16) for digit in path)], np.int32)


TEXTS = {name: [list(map(parse, text)) for text in texts] for name, texts in RECORDED.items()}


@dataclass
class Machine:
    """What passes and drafts take, ms."""

    rows: tuple[int, ...]
    pass_ms: tuple[float, ...]
    draft_ms: float

    def pass_s(self, rows: int) -> float:
        return 1e-3 * float(np.interp(rows, self.rows, self.pass_ms))

    def speed(self, texts: str, size: int | None) -> float:
        """Tokens per second of texts with trees of one size; None is `auto`."""
        budget = AdaptiveBudget(VerifyCosts({n: self.pass_s(n) for n in SIZES if n <= NODES}))
        tokens, all_s, noise = 0, 0.0, np.random.default_rng(1)
        for text in TEXTS[texts]:
            done = 0
            while done < len(text):
                tree, path = text[done]
                kept = np.arange(size or 1)
                seconds = {} if size == 1 else {"draft": 1e-3 * self.draft_ms}
                if size is None:
                    if budget.begin():
                        (kept,) = budget.prune([tree], [LENGTH])
                    else:
                        seconds = {}
                tree, path = tree.subset(kept[kept < len(tree)]), path[np.isin(path, kept)]
                path = np.searchsorted(kept, path).astype(np.int32)
                seconds["verify"] = self.pass_s(len(tree)) * float(np.exp(0.05 * noise.normal()))
                budget.observe([tree], [path], [LENGTH], seconds)
                done, all_s = done + len(path), all_s + sum(seconds.values())
            tokens += done
        return tokens / all_s


OWN_BITS = (1, 5, 8, 12), (8.0, 10.5, 12.0, 14.5)
FLOAT32 = (1, 5, 8, 12), (50.0, 58.0, 63.0, 69.0)
GPU = (1, 8, 9, 12), (10.0, 10.1, 13.0, 13.0)


@pytest.mark.parametrize("texts", sorted(TEXTS))
@pytest.mark.parametrize(
    ("machine", "bound"),
    [
        pytest.param(Machine(*OWN_BITS, 12.0), 0.98, id="own bits, drafts that hardly pay"),
        pytest.param(Machine(*OWN_BITS, 5.5), 0.97, id="own bits, cheaper drafts"),
        pytest.param(Machine(*FLOAT32, 18.0), 0.99, id="float32"),
        pytest.param(Machine(*GPU, 2.5), 0.97, id="gpu"),
    ],
)
def test_auto_is_as_fast_as_the_best_fixed_size_and_as_plain_decoding(machine, bound, texts):
    fixed = [machine.speed(texts, size) for size in (1, 5, 8, 12)]
    assert machine.speed(texts, None) > bound * max(fixed)
