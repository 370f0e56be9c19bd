"""How recurrent heads make tables, written once for PyTorch and MLX.

The state of such a head depends on all tokens of a path. So a row of the table follows a path, and
the rows of a depth are the best children of all paths so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.heads.operations import Array, Operations, RecurrentCell, Slots


def best_children(
    ops: Operations, path_log_probs: Array | None, log_probs: Array, k: int, width: int
) -> tuple[Array, Array]:
    """Choose the children that are the rows of the next depth.

    The (b, n) paths of b sequences have (b, n * k) `log_probs` of their k children; without
    `path_log_probs` the path is the root alone. Returns (b, w) indices of at most `width` children,
    best first, and the log probabilities of the paths to them.
    """
    children = log_probs
    if path_log_probs is not None:
        batch, n = path_log_probs.shape
        paths = path_log_probs[:, :, None] + log_probs.reshape(batch, n, k)
        children = paths.reshape(batch, n * k)
    # The first child is the chain's, which must not end here.
    chain = ops.full((len(children), 1), inf, children)
    kept = ops.top(ops.concatenate([chain, children[:, 1:]], 1), min(width, children.shape[1]))
    return kept, ops.gather(children, kept)


def on_host(ops: Operations, x: Array) -> NDArray[np.float32]:
    """Return an (n, size) float32 array of the framework as one of NumPy."""
    return np.stack([row for (row,) in ops.read([x])])


class RecurrentHead:
    """`treeflash.decoding.interfaces.ARHead` for a head with a state for each path.

    Args:
        module: the backend's module of the head.
        output: the backend's output stage, which embeds tokens and computes logits.
    """

    ops: Operations

    def __init__(self, module: RecurrentCell, output: Any) -> None:
        self.module, self.output = module, output

    def transitions(self, blocks: Sequence[Any], options: TableOptions) -> list[TransitionTable]:
        """Compute the logits of all sequences together, then follow the paths of each sequence.

        One read from the device gets the tables of all sequences.
        """
        hidden = self.ops.concatenate([block.hidden for block in blocks], 0)
        slots, depths = Slots.read(self.output, hidden), len(hidden) // len(blocks)
        logits = self.output.logits(slots.normed)
        (noise,) = self.output.noise_by_depth(options.noise, 1)  # of all depths, as the logits
        if noise is not None:
            logits = logits + noise
        found: list[Array] = []
        for i, block in enumerate(blocks):
            part = slice(i * depths, (i + 1) * depths)
            own = hidden[part], slots.normed[part], logits[part]
            root = self.ops.arange(1, logits) + block.root
            state = self.module.start(self.output, block)
            found += self.follow(options, *own, root, state)
        (numbers,) = self.ops.read(found)
        size = len(numbers) // len(blocks)
        by_block = (numbers[i : i + size] for i in range(0, len(numbers), size))
        parts = size // depths
        return [TransitionTable.from_paths(*(x[i::parts] for i in range(parts))) for x in by_block]

    def log_probs(self, block: Any, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        ops, slots = self.ops, Slots.read(self.output, block.hidden)
        logits, state = self.output.logits(slots.normed), self.module.start(self.output, block)
        rows = []
        for depth, token in enumerate(previous.tolist()):
            state, queries = self.module.step(slots, state, ops.ids([token], logits), depth)
            bias = ops.as_linear(self.module.token_rows, queries)
            rows.append(ops.float32(logits[depth]) + ops.float32(bias))
        log_probs = ops.log_softmax(ops.concatenate(rows, 0))
        return on_host(ops, self.output.over_target_vocabulary(log_probs))

    def follow(
        self,
        options: TableOptions,
        hidden: Array,  # (D, hidden_size) of the slots, as `normed`
        normed: Array,
        logits: Array,  # (D, Vd) of the slots, with their noise
        root: Array,  # (1,) token
        state: Array,  # the result of `RecurrentCell.start`
    ) -> Sequence[Array]:
        """Follow the paths of one sequence, by arrays alone whose sizes the options fix.

        Returns (1, size) arrays for each depth: the tokens and log probabilities of all children,
        the children that are the next rows and, of some heads, the confidences of the rows.
        """
        ops, module, temperature = self.ops, self.module, options.temperature
        width = options.m if options.rows is None else min(options.m, options.rows)
        vocab = keys = mass = None
        if options.shortlist is not None and options.shortlist < logits.shape[1]:
            scaled = ops.float32(logits)
            marginal = ops.log_softmax(scaled if temperature == 1 else scaled / temperature)
            (vocab,) = ops.largest(ops.amax(marginal, 0)[None], options.shortlist)
            mass = ops.logsumexp(marginal[:, vocab])
            keys, logits = module.token_rows(vocab), logits[:, vocab]
        k = min(options.k, logits.shape[1])
        slots, previous = Slots(self.output, hidden, normed), root
        path_log_probs: Array | None = None
        arrays: list[Array] = []
        for depth in range(len(logits)):
            state, queries = module.step(slots, state, previous, depth)
            table = module.token_rows
            bias = ops.as_linear(table, queries) if keys is None else queries @ keys.T
            scores = ops.float32(logits[depth]) + ops.float32(bias)
            tokens, log_probs = ops.top_log_probs(scores, k, temperature)
            if vocab is not None and mass is not None:
                tokens, log_probs = vocab[tokens], log_probs + mass[depth]
            tokens = self.output.to_target(tokens).reshape(1, -1)
            log_probs = log_probs.reshape(1, -1)
            kept, path_log_probs = best_children(ops, path_log_probs, log_probs, k, width)
            arrays += [tokens, log_probs, kept]
            rows = ops.full(previous.shape, depth, previous)
            if (confidence := module.confidence(slots, previous, rows)) is not None:
                arrays.append(confidence[None])
            previous = ops.gather(tokens, kept)[0]
            state = ops.take(state, kept[0] // k)
        return arrays
