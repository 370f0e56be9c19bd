"""A dense decoder in layers of our own, for inference.

A pass is a list of rows: each has a token, a rotary position, and an attention that knows which
keys it sees. Rows of several sequences are rows like others, so that everything but the attention
is the same for a lone token, a draft tree, a prompt and a batch of them:

    embed -> [ norm -> queries, keys, values -> rotate, store -> attend -> output
               norm -> gate and up -> activate -> down ] for each layer -> norm -> head

The norms also add a sublayer's output to what it read: so a layer hands on both, and the next norm
adds them. What differs between families is in `DecoderFacts`, and what computes it in
`DecoderOperations`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from treeflash_cuda.cpu.decoder_facts import DecoderFacts
from treeflash_cuda.cpu.decoder_operations import Attention, DecoderOperations, Rotation
from treeflash_cuda.cpu.low_bit_linear import LowBitEmbedding, LowBitLinear

Table: TypeAlias = nn.Embedding | LowBitEmbedding


class Weights(Protocol):
    """The weights of a decoder, by the names of transformers' modules."""

    def read(self, name: str, *shape: int) -> Tensor:
        """Return the tensor with a name, which must have this shape."""

    def table(self, name: str, rows: int, size: int) -> Table:
        """Return the input table: (..., size) rows of (...) tokens."""

    def head(
        self, name: str, table: Table | None, rows: int, size: int
    ) -> tuple[nn.Module, Tensor | LowBitLinear]:
        """Return the output head, and the weight that tokens have rows of.

        `table` is the input table if its weight is the head's.
        """

    def linear(self, place: str, size: int, **outputs: int) -> nn.Module:
        """Return the layers with these names and numbers of outputs as one.

        They are beside each other at a place, and read the same `size` numbers.
        """


class DecoderLayer(nn.Module):
    """One layer."""

    def __init__(
        self, facts: DecoderFacts, index: int, operations: DecoderOperations, weights: Weights
    ) -> None:
        super().__init__()
        self.facts, self.operations, self.index = facts, operations, index
        self.window, self.is_rotated = facts.windows[index], facts.rotated[index]
        size, inner, d = facts.hidden_size, facts.intermediate_size, facts.head_dim
        q, kv = facts.heads * d, facts.kv_heads * d
        place = f"model.layers.{index}"
        attention, network = f"{place}.self_attn", f"{place}.mlp"
        self.qkv = weights.linear(attention, size, q_proj=q, k_proj=kv, v_proj=kv)
        self.o_proj = weights.linear(attention, q, o_proj=size)
        self.gate_up = weights.linear(network, size, gate_proj=inner, up_proj=inner)
        self.down_proj = weights.linear(network, inner, down_proj=size)
        self.input_norm = constant(weights.read(f"{place}.input_layernorm.weight", size))
        norm = f"{place}.post_attention_layernorm.weight"
        self.network_norm = constant(weights.read(norm, size))
        self.head_norms: Tensor | None = None  # of queries, then of keys, a row for each head
        if facts.norms_heads:
            q_norm, k_norm = (weights.read(f"{attention}.{x}_norm.weight", d) for x in ("q", "k"))
            parts = q_norm.expand(facts.heads, d), k_norm.expand(facts.kv_heads, d)
            self.head_norms = torch.cat(parts)

    def forward(
        self, y: Tensor, residual: Tensor | None, rotation: Rotation, attention: Attention
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run (n, hidden_size) rows: `y` + `residual` is what the layer reads.

        Returns what it read, and the two parts of what it gives: its network's output, and the
        residual.
        """
        facts, ops = self.facts, self.operations
        y, x = ops.rms_norm(y, self.input_norm, facts.eps, residual)
        heads = self.qkv(y).view(len(x), -1, facts.head_dim)
        turns = rotation if self.is_rotated else None
        queries = attention.turn(self.index, heads, turns, self.head_norms, facts.eps)
        y = self.o_proj(attention.attend(self.index, queries, self.window))
        y, attended = ops.rms_norm(y, self.network_norm, facts.eps, x)
        return x, self.down_proj(ops.gated(self.gate_up(y))), attended


class Decoder(nn.Module):
    """The layers between embeddings and the output head, and both of them."""

    def __init__(
        self, facts: DecoderFacts, operations: DecoderOperations, weights: Weights
    ) -> None:
        super().__init__()
        self.facts, self.operations = facts, operations
        table = facts.vocab_size, facts.hidden_size
        self.embeddings = weights.table("model.embed_tokens", *table)
        self.layers = nn.ModuleList(
            DecoderLayer(facts, n, operations, weights) for n in range(facts.layers)
        )
        self.norm = constant(weights.read("model.norm.weight", facts.hidden_size))
        tied = self.embeddings if facts.ties_head else None
        self.lm_head, self.head_weight = weights.head("lm_head", tied, *table)

    def rotation(self, positions: Tensor) -> Rotation:
        """Compute the rotation of (n,) positions."""
        angles = positions.float()[:, None, None] * self.facts.frequencies
        cos, sin = angles.cos() * self.facts.rope_scale, angles.sin() * self.facts.rope_scale
        parts = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return parts[0].to(self.norm.dtype), parts[1].to(self.norm.dtype)

    def forward(
        self, tokens: Tensor, positions: Tensor, attention: Attention, captured: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run (n,) tokens: the (n, hidden_size) that the head reads, and outputs of layers.

        `captured` are the indices of these layers: -1 stands for the embeddings, and the number of
        layers for the final norm.
        """
        rotation, outputs = self.rotation(positions), dict[int, Tensor]()
        y, residual = self.embeddings(tokens), None
        for n, layer in enumerate(self.layers):
            x, y, residual = layer(y, residual, rotation, attention)
            if n - 1 in captured:
                outputs[n - 1] = x
        normed, x = self.operations.rms_norm(y, self.norm, self.facts.eps, residual)
        last = len(self.layers)
        outputs |= {n: found for n, found in ((last - 1, x), (last, normed)) if n in captured}
        return normed, outputs


def constant(tensor: Tensor) -> nn.Parameter:
    """Return a tensor as a parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)
