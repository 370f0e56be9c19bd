"""Drawings of draft trees: proposed tokens, their probabilities, and the accepted path."""

from __future__ import annotations

import math

from rich.text import Text
from rich.tree import Tree

from treeflash.decoding.loop import Step
from treeflash.decoding.tree import DraftTree
from treeflash.text.tokenizer import Tokenizer

SHOWN_NODES = 20


def explain(step: Step, number: int, tokenizer: Tokenizer) -> Tree:
    """A drawing of one iteration's tree.

    Large trees are cut to the most probable nodes and the accepted path.

    Args:
        step: an iteration, not the prefill.
        number: of the iteration, from 1.
        tokenizer: names the tokens.
    """
    tree, path = step.tree, step.path
    assert tree is not None
    assert path is not None
    accepted = set(path.tolist())
    # A parent is at least as probable as its children and comes before them: the cut is a tree.
    likeliest = (-tree.log_probs).argsort(kind="stable")[:SHOWN_NODES].tolist()
    shown = sorted(accepted | set(likeliest))
    parents = tree.parents.tolist()
    title = f"iteration {number}: {_count(len(tree), 'node')}, {len(path) - 1} accepted + bonus"
    if hidden := len(tree) - len(shown):
        title += f" ({_count(hidden, 'less probable node')} not shown)"
    drawing = Tree(Text(title, style="bold"))
    branches: dict[int, Tree] = {-1: drawing}
    for node in shown:
        label = _label(tokenizer, int(tree.tokens[node]), node in accepted)
        label.append(f"  {_probability(tree, node)}" if node else "  root", style="dim")
        branches[node] = branches[parents[node]].add(label)
    if len(step.tokens) == len(path):
        bonus = _label(tokenizer, step.tokens[-1], True)
        bonus.append("  bonus: the target's own choice", style="dim")
    else:
        bonus = Text("(the text ended on this path)", style="dim")
    branches[int(path[-1])].add(bonus)
    return drawing


def _label(tokenizer: Tokenizer, token: int, accepted: bool) -> Text:
    text = Text("✓ " if accepted else "  ", style="bold green" if accepted else "")
    return text.append(repr(tokenizer.token_text(token)))


def _probability(tree: DraftTree, node: int) -> str:
    """The drafter's probability of the path to a node; below depth 1 also that given its parent."""
    path = tree.log_probs[node]
    text = f"{math.exp(path):.1%}"
    if tree.depths[node] > 1:
        text += f" ({math.exp(path - tree.log_probs[tree.parents[node]]):.1%} after its parent)"
    return text


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
