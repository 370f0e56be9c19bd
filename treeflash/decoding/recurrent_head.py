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
from treeflash.decoding.output_stage import OutputStage
from treeflash.decoding.transitions import PathBatch, TransitionTable
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


class RecurrentHead:
    """`treeflash.decoding.interfaces.ARHead` for a head with a state for each path.

    Args:
        module: the backend's module of the head.
        output: the backend's output stage of the drafter.
    """

    def __init__(self, module: RecurrentCell, output: OutputStage) -> None:
        self.module, self.output, self.ops = module, output, output.ops

    def transitions(self, blocks: Sequence[Any], options: TableOptions) -> list[TransitionTable]:
        """Follow the paths of all sequences together; one read from the device gets all tables."""
        outputs = self.ops.stack([block.hidden for block in blocks], 0)
        roots = self.ops.ids([block.root for block in blocks], outputs)
        (noise,) = self.output.noise_by_depth(options.noise, 1)  # one array for all depths
        depths = len(blocks[0].hidden)
        found = self.follow(options, outputs, roots, noise)
        return tables(self.ops.read(found), depths, depths)

    def log_probs(self, block: Any, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        ops, slots = self.ops, Slots.read(self.output, block.hidden)
        logits = self.output.logits(slots.normed)
        state = self._start(slots)
        rows = []
        for depth, token in enumerate(previous.tolist()):
            state, queries = self.module.step(slots, state, ops.ids([token], logits), depth)
            bias = ops.as_linear(self.module.token_rows, queries)
            rows.append(ops.float32(logits[depth]) + ops.float32(bias))
        log_probs = ops.log_softmax(ops.concatenate(rows, 0))
        (found,) = ops.read([self.output.over_target_vocabulary(log_probs)])
        return found

    def follow(
        self,
        options: TableOptions,  # whose noise is not used
        outputs: Array,  # (B, D, hidden_size) outputs of the drafter at the slots of B blocks
        roots: Array,  # (B,) tokens
        noise: Array | None,  # (B * D, Vd), added to the logits
        limits: Array | None = None,  # see `shortlist`
    ) -> list[Array]:
        """Follow the paths of B sequences, with arrays whose sizes follow from the options alone.

        Returns (B, size) arrays for each depth: the tokens and log probabilities of all children,
        the children that are the next rows and, of some heads, the confidences of the rows.
        """
        ops, module, temperature = self.ops, self.module, options.temperature
        blocks, depths, _ = outputs.shape
        width = options.m if options.rows is None else min(options.m, options.rows)
        slots = Slots.read(self.output, outputs.reshape(blocks * depths, -1), blocks)
        state = self._start(slots)
        logits = self.output.logits(slots.normed)
        if noise is not None:
            logits = logits + noise
        vocab = keys = mass = None
        if options.shortlist is not None and options.shortlist < logits.shape[1]:
            scaled = ops.float32(logits)
            marginal = ops.log_softmax(scaled if temperature == 1 else scaled / temperature)
            marginal = marginal.reshape(blocks, depths, -1)
            vocab, excluded = self.shortlist(marginal, options.shortlist, limits)
            of_slots = ops.repeat(vocab, depths)
            logits, marginal = (
                ops.gather(x.reshape(blocks * depths, -1), of_slots) for x in (logits, marginal)
            )
            if excluded is not None:
                of_slots = ops.repeat(excluded, depths)
                logits, marginal = logits + of_slots, marginal + of_slots
            mass = ops.logsumexp(marginal).reshape(blocks, depths, 1)
            keys = module.token_rows(vocab).swapaxes(1, 2)
        logits = logits.reshape(blocks, depths, -1)
        k, previous = min(options.k, logits.shape[2]), roots
        path_log_probs: Array | None = None
        arrays: list[Array] = []
        for depth in range(depths):
            state, queries = module.step(slots, state, previous, depth)
            n = len(queries) // blocks  # paths of a block
            if keys is None:
                bias = ops.as_linear(module.token_rows, queries).reshape(blocks, n, -1)
            else:
                bias = queries.reshape(blocks, n, -1) @ keys
            scores = ops.float32(logits[:, depth, None]) + ops.float32(bias)
            tokens, log_probs = ops.top_log_probs(scores.reshape(blocks * n, -1), k, temperature)
            tokens, log_probs = tokens.reshape(blocks, n * k), log_probs.reshape(blocks, n * k)
            if vocab is not None and mass is not None:
                tokens, log_probs = ops.gather(vocab, tokens), log_probs + mass[:, depth]
            tokens = self.output.to_target(tokens)
            kept, path_log_probs = best_children(ops, path_log_probs, log_probs, k, width)
            arrays += [tokens, log_probs, kept]
            block = ops.arange(blocks, kept)[:, None]
            rows = ops.repeat((block * depths + depth)[:, 0], n)
            if (confidence := module.confidence(slots, previous, rows)) is not None:
                arrays.append(confidence.reshape(blocks, n))
            previous = ops.gather(tokens, kept).reshape(-1)
            state = ops.take(state, (kept // k + n * block).reshape(-1))
        return arrays

    def _start(self, slots: Slots) -> Array:
        """Return the (blocks, state_size) states before the roots."""
        shape = slots.blocks, self.output.config.head_state_size
        return self.ops.zeros(shape, slots.hidden)

    def shortlist(
        self, marginals: Array, size: int, limits: Array | None
    ) -> tuple[Array, Array | None]:
        """Choose shortlists, (B, size) ascending tokens, from (B, D, Vd) marginals.

        A backend that computes more than it was asked for, so that CUDA graphs are shared, gives
        itself limits, and returns what excludes the tokens beyond them: (B, size) float32, each 0
        or -inf.
        """
        return self.ops.largest(self.ops.amax(marginals, 1), size), None


def tables(numbers: Sequence[NDArray[Any]], depths: int, wanted: int) -> list[TransitionTable]:
    """Return the tables of B sequences, from the result of `RecurrentHead.follow` in NumPy.

    The arrays are of `depths`; the tables have the first `wanted`.
    """
    parts = len(numbers) // depths  # arrays of a depth
    return PathBatch(*(numbers[i : wanted * parts : parts] for i in range(parts))).tables()
