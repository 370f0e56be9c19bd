"""Tables for many texts: those that ask for the same are computed together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from treeflash.config import AUTO, DecodeConfig
from treeflash.decoding.interfaces import Backend, Block
from treeflash.decoding.transitions import TransitionTable

ROWS_PER_NODE, FEWEST_ROWS = 4, 32
"""Rows of the AR head for a tree: on average the block efficiency stays within 1.5 % of that with
all rows for 8 nodes, and within 1 % for more (docs/performance.md)."""


def propose(
    backend: Backend, blocks: Sequence[Block], configs: Sequence[DecodeConfig], nodes: Sequence[int]
) -> list[TransitionTable]:
    """The tables that chains or trees are built from.

    Args:
        backend: the loaded pair.
        blocks: of all texts, from one draft.
        configs: of the texts.
        nodes: that each tree is expected to have.
    """
    keys = [_key(config, size) for config, size in zip(configs, nodes, strict=True)]
    tables: dict[int, TransitionTable] = {}
    for key in dict.fromkeys(keys):
        texts = [i for i, other in enumerate(keys) if other == key]
        same, size = [blocks[i] for i in texts], max(nodes[i] for i in texts)
        tables |= zip(texts, _tables(backend, same, configs[texts[0]], size), strict=True)
    return [tables[i] for i in range(len(blocks))]


def _key(config: DecodeConfig, nodes: int) -> Hashable:
    """What texts must share to be computed together."""
    temperature, k = config.draft_temperature, config.top_k_children
    if not config.uses_head:
        return config.drafts_chain, k, temperature
    rows = nodes if config.head_rows == AUTO else config.head_rows
    return config.drafts_chain, k, temperature, config.top_m, config.head_vocab, rows


def _tables(
    backend: Backend, blocks: Sequence[Block], config: DecodeConfig, nodes: int
) -> list[TransitionTable]:
    k, temperature = config.top_k_children, config.draft_temperature
    if config.uses_head:
        assert backend.head is not None
        rows = config.head_rows
        if rows == AUTO:
            # The token that a chain continues from may be improbable by its marginal.
            rows = None if config.drafts_chain else max(ROWS_PER_NODE * nodes, FEWEST_ROWS)
        return backend.head.transitions(
            blocks, config.top_m, k, temperature, shortlist=config.head_vocab, rows=rows
        )
    assert backend.drafter is not None
    return backend.drafter.marginals(blocks, 1 if config.drafts_chain else k, temperature)
