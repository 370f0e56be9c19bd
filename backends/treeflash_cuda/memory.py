"""Memory on a GPU that is set aside for sequences: keys, values and states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from treeflash.config import GIB, DecodeConfig
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.logit_tables import table_options
from treeflash.decoding.sampling import Noise
from treeflash.decoding.transitions import TransitionTable
from treeflash.errors import MemoryShortError, UnsupportedModelError
from treeflash_cuda.cache import Arena
from treeflash_cuda.drafter import Block, Drafter
from treeflash_cuda.drafter_loading import Head, Model
from treeflash_cuda.gpu.graphs import MAX_ROWS
from treeflash_cuda.gpu.row_pass import RowTarget
from treeflash_cuda.mtp_head import MtpArena, MtpHead, MtpModel
from treeflash_cuda.target import Target

FREE_MEMORY_SHARE = 0.85
"""Share of the memory that models and passes leave free on a GPU, for keys and values. The rest is
for the tokens' choice, the drafter's passes, and what the allocator cannot use."""
MEASURED_TEXTS = 16
"""Texts whose tables are measured: as many as a server decodes at once by default."""
TABLE = table_options(DecodeConfig(), 64)
"""The options of most tables, which are rounded up to these for graphs."""
STATES_EACH = 2
"""Recurrent states of a sequence at once: a commit writes to another slot."""
STATE_SEQUENCES = 32
"""Sequences whose recurrent states have room beside keys and values."""
GRAPH_FACTOR = 2
"""A pass, and a CUDA graph of it, which keeps its memory."""
WRAPPED_MEMORY_SHARE = 0.2
"""Share of that memory that is set aside beside a model that its owner goes on using."""


def new_drafter_arena(model: Model, target: Target) -> Arena:
    """Create an arena for the keys and values of a drafter."""
    config, layers, arena = model.config, len(model.layers), Arena(len(model.layers))
    if isinstance(model, MtpModel):
        arena = MtpArena(layers, config.hidden_size)
    shape = 1, config.num_key_value_heads, 0, config.head_dim
    arena.set_shape(torch.empty(shape, dtype=target.dtype, device=target.device))
    arena.page = target.arena.page
    return arena


def reserve_memory(
    target: Target,
    drafter: Arena | None,
    passes: int,
    share: float,
    memory_gb: float | None = None,
) -> None:
    """Let each arena reserve its part of the GPUs' memory: columns for equal positions.

    A GPU has the columns of its layers, and the target's GPU has the drafter's columns too. The
    GPU with the least room for a position decides. Recurrent states of `STATE_SEQUENCES` come
    first, but have at most half.

    Args:
        target: what the memory is for.
        drafter: the drafter's arena; None without a drafter.
        passes: bytes of the target's GPU for passes, drafts, and their graphs.
        share: part of the memory that is left, for keys and values.
        memory_gb: GiB of each GPU that take the place of the share.

    Raises a MemoryShortError if so much memory is not left.
    """
    home, whole = target.device, target.arena
    torch.cuda.empty_cache()
    layers = Counter({home: 0})
    for device, count in target.spans or [(home, whole.layers)]:
        layers[device] += count
    left = {x: max(torch.cuda.mem_get_info(x)[0] - passes, 0) for x in layers}
    room = {x: int(share * nbytes) for x, nbytes in left.items()}
    if memory_gb is not None:
        room = dict.fromkeys(layers, int(memory_gb * GIB))
        if (least := min(left.values())) < room[home]:
            raise MemoryShortError(
                f"memory_gb is {memory_gb:g}, but the models leave {least / GIB:.2f} GiB free"
            )
    if target.state_arena is not None:
        states = min(STATES_EACH * STATE_SEQUENCES, room[home] // 2 // target.states_nbytes)
        target.state_arena.reserve(states)
        room[home] -= states * target.states_nbytes
    needed = {x: whole.column_nbytes * n // max(whole.layers, 1) for x, n in layers.items()}
    needed[home] += 0 if drafter is None else drafter.column_nbytes
    fullest = min(layers, key=lambda x: room[x] / max(needed[x], 1))
    for arena in (whole, drafter):
        if arena is not None:
            part = room[fullest] * arena.column_nbytes
            arena.reserved_nbytes = part // max(needed[fullest], 1)


def pass_nbytes(target: Target) -> int:
    """Return the memory that a pass over the largest tree takes, bytes; 0 if it is not one pass.

    The peak that PyTorch counts for the process begins anew.
    """
    if not isinstance(target, RowTarget) or target.operations is None:
        return 0
    if target.split or target.spans is not None:
        return 0
    torch.cuda.reset_peak_memory_stats(target.device)
    before = torch.cuda.memory_allocated(target.device)
    try:
        target.run_tree(MAX_ROWS)
    except UnsupportedModelError:  # trees then run with masks
        return 0
    return torch.cuda.max_memory_allocated(target.device) - before


def make_tables(
    maker: Head | Drafter, blocks: Sequence[Any], options: TableOptions
) -> Sequence[TransitionTable]:
    """Let a head make the tables of blocks, or a drafter without one."""
    if isinstance(maker, Drafter):
        return maker.marginals(blocks, options)
    return maker.transitions(blocks, options)


@torch.inference_mode()
def table_nbytes(maker: Head | Drafter | None, target: Target) -> int:
    """Return the memory that the tables of many sampled texts take, bytes; 0 without a maker.

    A head that drafts depth by depth computes no more than a pass of the target. The peak that
    PyTorch counts for the process begins anew.
    """
    if maker is None or isinstance(maker, MtpHead):
        return 0
    config = maker.output.config
    outputs = torch.zeros(
        config.depths, config.hidden_size, dtype=target.dtype, device=target.device
    )
    block = Block(0, outputs, outputs, torch.zeros(1, dtype=torch.int32, device=target.device))
    rows = MEASURED_TEXTS * config.depths
    noise = Noise(np.zeros((rows, 2), np.uint32), np.ones(rows, np.float32))
    torch.cuda.reset_peak_memory_stats(target.device)
    before = torch.cuda.memory_allocated(target.device)
    with target.graphs.paused():
        make_tables(maker, [block] * MEASURED_TEXTS, replace(TABLE, noise=noise))
    return torch.cuda.max_memory_allocated(target.device) - before
