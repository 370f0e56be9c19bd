"""The mixers of a decoder's layers, in which rows read what other rows wrote.

Attention reads keys and values. A gated delta net reads a state instead, a matrix for each head:
every row forgets a part of the state of the row before it, and corrects what the state has for its
key. In a draft tree, the row before a node is its parent (`treeflash.decoding.hybrid`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash_cuda.decoder.facts import DecoderFacts
from treeflash_cuda.decoder.families import ATTENTION_GATE, DELTA_NET
from treeflash_cuda.decoder.operations import (
    Attention,
    Recurrences,
    Rotation,
    Weights,
    constant,
)


class AttentionMixer(nn.Module):
    """Attention, whose output some families multiply with a gate."""

    def __init__(self, facts: DecoderFacts, index: int, weights: Weights) -> None:
        super().__init__()
        self.facts, self.window = facts, facts.windows[index]
        self.slot = facts.attention_layers.index(index)  # its number in the KV caches
        size, d = facts.hidden_size, facts.head_dim
        q, kv = facts.heads * d, facts.kv_heads * d
        place = f"{weights.place}.layers.{index}.self_attn"
        self.qkv = weights.linear(place, size, q_proj=q, k_proj=kv, v_proj=kv)
        self.gate: nn.Module | None = None
        if facts.gates_attention:
            self.gate = weights.linear(place, size, **{ATTENTION_GATE: q})
        self.o_proj = weights.linear(place, q, o_proj=size)
        self.head_norms: Tensor | None = None  # norms of queries, then of keys, a row for each head
        if facts.norms_heads is not None:
            parts = []
            for name, heads in (("q_norm", facts.heads), ("k_norm", facts.kv_heads)):
                rows = 1 if facts.norms_heads == "each" else heads
                weight = weights.norm(f"{place}.{name}", rows * d).view(rows, d)
                if facts.head_order is not None:
                    weight = weight[:, facts.head_order]
                parts.append(weight.expand(heads, d))
            self.head_norms = torch.cat(parts)

    def forward(self, y: Tensor, rotation: Rotation | None, attention: Attention) -> Tensor:
        """Map (n, hidden_size) rows to as many."""
        facts = self.facts
        heads = self.qkv(y).view(len(y), -1, facts.head_dim)
        queries = attention.turn(self.slot, heads, rotation, self.head_norms, facts.eps)
        attended = attention.attend(self.slot, queries, self.window)
        if self.gate is not None:
            attended = attended * self.gate(y).sigmoid()
        output: Tensor = self.o_proj(attended)
        return output


class GatedDeltaNet(nn.Module):
    """A gated delta net with a short convolution, and a gated norm of what rows read."""

    def __init__(self, facts: DecoderFacts, index: int, weights: Weights) -> None:
        super().__init__()
        assert facts.delta_nets is not None
        self.facts, self.nets, self.index = facts, facts.delta_nets, index
        nets, place = self.nets, f"{weights.place}.layers.{index}.linear_attn"
        values = nets.heads * nets.value_dim
        self.widths = nets.channels, values, nets.heads, nets.heads
        named = dict(zip(DELTA_NET, self.widths, strict=True))
        self.inputs = weights.linear(place, facts.hidden_size, **named)
        filters = weights.read(f"{place}.conv1d.weight", nets.channels, 1, nets.kernel)
        self.filters = constant(filters[:, 0].contiguous())
        self.rates = constant(-weights.read(f"{place}.A_log", nets.heads).float().exp())
        self.step_bias = constant(weights.read(f"{place}.dt_bias", nets.heads).float())
        self.norm = constant(weights.read(f"{place}.norm.weight", nets.value_dim).float())
        self.output = weights.linear(place, values, out_proj=facts.hidden_size)

    def forward(self, y: Tensor, recurrences: Recurrences) -> Tensor:
        """Map (n, hidden_size) rows to as many."""
        nets = self.nets
        rows, gates, b, a = self.inputs(y).split(self.widths, 1)
        mixed = recurrences.convolve(self.index, rows, self.filters, self.facts.activation)
        keys = nets.key_heads * nets.key_dim
        q, k, v = mixed.tensor_split([keys, 2 * keys], 1)
        q, k = (x.unflatten(1, (-1, nets.key_dim)) for x in (q, k))
        v, gates = (x.unflatten(1, (-1, nets.value_dim)) for x in (v, gates))
        log_g = self.rates * F.softplus(a.float() + self.step_bias)
        read = recurrences.delta_rule(self.index, q, k, v, log_g, b.sigmoid()).float()
        normed = F.rms_norm(read, self.norm.shape, self.norm, self.facts.eps)
        output: Tensor = self.output((normed * F.silu(gates.float())).to(y.dtype).flatten(1))
        return output
