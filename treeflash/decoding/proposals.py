"""Tables for many texts: those that ask for the same are computed together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeflash.config import AUTO, DecodeConfig
from treeflash.decoding.gumbel import Noise
from treeflash.decoding.interfaces import Backend, Block
from treeflash.decoding.transitions import TransitionTable

ROWS_PER_NODE, FEWEST_ROWS = 4, 16
"""Rows of the AR head for a tree: on average the block efficiency stays within 1.5 % of that with
all rows for 8 nodes, and within 1 % for more (docs/performance.md)."""
TOKENS_PER_NODE, FEWEST_TOKENS = 32, 256
"""Tokens that the AR head scores for a tree, if no fewer are asked for; 256 change the block
efficiency of 8 nodes by 0.1 %."""


@dataclass(frozen=True)
class TreeSize:
    """What a tree can use of a draft.

    Attributes:
        expected: nodes of the tree that is verified.
        built: nodes of the tree that is built, and perhaps cut.
        depths: that it is likely to reach; None for all.
    """

    expected: int
    built: int
    depths: int | None

    @classmethod
    def fixed(cls, nodes: int) -> TreeSize:
        """Of a tree that is not cut.

        Its deepest node is the last of a chain, at depth nodes - 1. One depth more tells what would
        have followed it.
        """
        return cls(nodes, nodes, nodes)


def propose(
    backend: Backend,
    blocks: Sequence[Block],
    configs: Sequence[DecodeConfig],
    sizes: Sequence[TreeSize],
    positions: Sequence[NDArray[np.int32]] = (),
) -> list[TransitionTable]:
    """The tables that chains or trees are built from.

    Args:
        backend: the loaded pair.
        blocks: of all texts, from one draft.
        configs: of the texts.
        sizes: of the trees.
        positions: (D,) of each block's depths; not used if the texts are greedy.
    """
    keys = [_key(config, size.expected) for config, size in zip(configs, sizes, strict=True)]
    tables: dict[int, TransitionTable] = {}
    for key in dict.fromkeys(keys):
        texts = [i for i, other in enumerate(keys) if other == key]
        same, of_texts = [blocks[i] for i in texts], [sizes[i] for i in texts]
        noise = None
        if not all(configs[i].sampling.greedy for i in texts):
            noise = Noise.at([(configs[i].sampling, positions[i]) for i in texts])
        found = _tables(backend, same, configs[texts[0]], of_texts, noise)
        tables |= zip(texts, found, strict=True)
    return [tables[i] for i in range(len(blocks))]


def _key(config: DecodeConfig, nodes: int) -> Hashable:
    """What texts must share to be computed together."""
    temperature, k = config.draft_temperature, config.top_k_children
    if not config.uses_head:
        return config.drafts_chain, k, temperature
    sizes = nodes, config.top_m, config.head_vocab, config.head_rows
    return config.drafts_chain, k, temperature, *sizes


def _tables(
    backend: Backend,
    blocks: Sequence[Block],
    config: DecodeConfig,
    sizes: Sequence[TreeSize],
    noise: Noise | None,
) -> list[TransitionTable]:
    nodes, temperature = max(size.expected for size in sizes), config.draft_temperature
    k = config.top_k_children
    if config.uses_head:
        assert backend.head is not None
        rows = config.head_rows
        if rows == AUTO:
            # The token that a chain continues from may be improbable by its marginal.
            rows = None if config.drafts_chain else max(ROWS_PER_NODE * nodes, FEWEST_ROWS)
        shortlist = config.head_vocab
        if shortlist is not None:
            shortlist = min(shortlist, max(TOKENS_PER_NODE * nodes, FEWEST_TOKENS))
        return backend.head.transitions(
            blocks, config.top_m, k, temperature, noise=noise, shortlist=shortlist, rows=rows
        )
    assert backend.drafter is not None
    k = 1 if config.drafts_chain else k
    return backend.drafter.marginals(blocks, k, temperature, noise)
