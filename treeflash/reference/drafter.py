"""The one-shot drafter (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.backend_base import OneByOneDrafter
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.output_stage import Block
from treeflash.decoding.transitions import TransitionTable
from treeflash.drafters.config import window_gap
from treeflash.reference.drafter_model import DrafterModel
from treeflash.reference.numerics import (
    Array,
    Ints,
    attention,
    block_visible,
    log_softmax,
    sigmoid,
    top,
    visible,
)
from treeflash.reference.target import Cache
from treeflash.reference.verifier import State

Sublayer: TypeAlias = Callable[[Array], Array]


class Drafter(OneByOneDrafter):
    """`treeflash.decoding.interfaces.Drafter` in NumPy.

    It sees `window` positions before a draft, besides the first few; None is all.
    """

    def __init__(self, model: DrafterModel, window: int | None) -> None:
        self.model, self.window = model, window

    def draft_one(self, state: State, root: int, depths: int | None) -> Block:
        cache = state.drafter
        assert cache is not None
        if state.context:
            self._read(cache, np.concatenate(state.context))
            state.context = []
        config, start = self.model.config, cache.length
        tokens = np.full(config.block_size, config.mask_token_id)
        tokens[0] = root
        positions = start + np.arange(config.block_size, dtype=np.int32)
        keys = np.arange(start + config.block_size, dtype=np.int32)
        first, end = window_gap(start, self.window)
        x = self.model.embed(tokens) * np.float32(config.input_scale)
        for n in range(config.num_hidden_layers):
            seen = block_visible if config.window_from_root else visible
            mask = seen(positions, keys, config.sliding_windows[n], config.causal[n])
            mask = mask & ((keys < first) | (keys >= end))
            attend = partial(self._attend, cache, n, positions, mask)
            x = self._layer(f"layers.{n}.", x, attend)
        return Block(root, x[config.first_slot :][:depths])

    def _layer(self, layer: str, x: Array, attend: Sublayer) -> Array:
        """Map the outputs of the layer before to the outputs of a layer, with its convolutions."""
        y = self.model.normed(layer + "input_layernorm", x)
        if not self.model.config.conv_kernel_size:
            return self.model.finish(layer, attend(y), x)
        before, after = self._convolutions(layer + "attention_conv", y)
        x = x + after(attend(before(y)))
        y = self.model.normed(layer + "post_attention_layernorm", x)
        before, after = self._convolutions(layer + "mlp_conv", y)
        return x + after(self.model.feed_forward(layer + "mlp.", before(y)))

    def _attend(
        self, cache: Cache, n: int, positions: Ints, mask: NDArray[np.bool_], y: Array
    ) -> Array:
        """Attend from a layer's (S, hidden_size) normed inputs to the context and the block."""
        layer, config = f"layers.{n}.", self.model.config
        q = self.model.linear(layer + "self_attn.q_proj", y)
        q = self.model.heads(layer + "self_attn.q", q, positions)
        k, v = cache.attend(n, *self.model.keys_and_values(layer, y, positions))
        sinks = self.model.tensors.get(layer + "self_attn.attention_sink_bias")
        out = attention(q, k, v, mask, 1.0 if config.gemma4 else None, sinks)
        if config.gated:
            out = out * sigmoid(self.model.linear(layer + "self_attn.gate_proj", y))
        return self.model.linear(layer + "self_attn.o_proj", out)

    def marginals_one(self, block: Block, options: TableOptions) -> TransitionTable:
        logits = self.model.logits(block.hidden)
        if options.noise is not None:
            logits = logits + options.noise.values(self.model.token_ids)
        tokens, log_probs = top(logits / options.temperature, options.k)
        return TransitionTable.from_marginals(self.model.token_ids[tokens], log_probs)

    def log_probs(self, block: Block) -> Array:
        return self.model.over_target_vocabulary(log_softmax(self.model.logits(block.hidden)))

    def _read(self, cache: Cache, features: Array) -> None:
        """Project positions to keys and values, once for all blocks."""
        context = self.model.normed("hidden_norm", self.model.linear("fc", features))
        rows = np.arange(len(context), dtype=np.int32)
        for n in range(self.model.config.num_hidden_layers):
            k, v = self.model.keys_and_values(f"layers.{n}.", context, rows + cache.length)
            cache.attend(n, k, v)
        cache.commit(rows)

    def _convolutions(self, name: str, y: Array) -> list[Sublayer]:
        """Return the convolutions before and after a sublayer, whose normed input is `y`."""
        config, tensors = self.model.config, self.model.tensors
        taps = config.conv_kernel_size
        groups = self.model.linear(name + ".kernel_projection", y).reshape(len(y), 2, taps, -1)
        kernels = tensors[name + ".base_kernel"] + groups.repeat(config.conv_group_size, -1)

        def convolution(side: int) -> Sublayer:
            def convolve(x: Array) -> Array:
                out = np.zeros_like(x)
                for tap in range(taps):  # tap n reads the slot n places before
                    out[tap:] += kernels[tap:, side, tap] * x[: len(x) - tap]
                return out

            return convolve

        return [convolution(0), convolution(1)]
