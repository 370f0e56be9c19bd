"""How far the reference's decisions are from a tie.

Backends add the same numbers in other orders and differ by some 1e-6. Where a tie is closer than
that, either decision is right; the suite takes prompts that meet no tie, so that it can ask for
equal tokens, trees and paths without exception.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.decoding.gumbel import position_keys
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.loop import Step
from treeflash.decoding.sampling import choose
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree, build_chain, build_tree
from treeflash.testing.texts import random_tokens

MARGIN = 1e-5
ATTEMPTS = 300


def settled_generation(
    reference: Backend, config: DecodeConfig, *, seed: int = 0
) -> tuple[list[int], list[Step]]:
    """A short random prompt for which the reference decodes without a close decision.

    Args:
        reference: the NumPy backend.
        config: how to decode.
        seed: of the prompts.

    Returns:
        The prompt, and the reference's steps.
    """
    rng = np.random.default_rng(seed)
    for _ in range(ATTEMPTS):
        prompt = random_tokens(rng, reference.vocab_size, int(rng.integers(1, 12)))
        steps = list(decode(reference, prompt, config))
        if _is_settled(reference, prompt, config, steps):
            return prompt, steps
    raise AssertionError(f"none of {ATTEMPTS} prompts is settled; choose other weights")


def is_settled_choice(
    logits: NDArray[np.float32], sampling: SamplingConfig, keys: NDArray[np.uint32] | None
) -> bool:
    """Whether a little noise on the logits changes none of the tokens chosen from them.

    Args:
        logits: (n, vocab).
        sampling: how to choose.
        keys: (n, 2) of the noise; None when greedy.
    """
    rng = np.random.default_rng(0)
    chosen = choose(logits, sampling, keys)
    noisy = (
        choose(logits + _noise(rng, logits.shape, 4 * MARGIN), sampling, keys) for _ in range(6)
    )
    return all(np.array_equal(chosen, tokens) for tokens in noisy)


def is_settled_table(table: TransitionTable) -> bool:
    """Whether the children of every row differ clearly in probability."""
    with np.errstate(invalid="ignore"):
        gaps = -np.diff(table.log_probs.astype(np.float64), axis=-1)
    return not (gaps < MARGIN).any()


def _is_settled(
    reference: Backend, prompt: Sequence[int], config: DecodeConfig, steps: Sequence[Step]
) -> bool:
    text = TextSession(reference)
    # The last token of the prompt is run as a tree of one node: its logits are then seen too.
    if prompt[:-1]:
        text.extend(prompt[:-1])
    first = DraftTree.root_only(prompt[-1]), np.zeros(1, np.int32), None
    verified = [(step.tree, step.path, step.table) for step in steps if step.tree is not None]
    for tree, path, table in [first, *verified]:
        assert path is not None
        if table is not None and not _is_settled_tree(table, int(tree.tokens[0]), config):
            return False
        keys = None
        if not config.sampling.greedy:
            keys = position_keys(config.sampling.seed, tree.positions(text.length + 1))[path]
        if not is_settled_choice(text.logits(tree)[path], config.sampling, keys):
            return False
        text.commit(path)
    return True


def _is_settled_tree(table: TransitionTable, root: int, config: DecodeConfig) -> bool:
    build = build_chain if config.drafts_chain else build_tree
    assert isinstance(config.budget, int)
    tree = build(table, root, config.budget + 1)  # the first node left out must differ as well
    follows_parent = tree.parents[1:] == np.arange(len(tree) - 1)
    return bool((follows_parent | (-np.diff(tree.log_probs) > MARGIN)).all())


def _noise(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> NDArray[np.float32]:
    return rng.uniform(-size, size, shape).astype(np.float32)
