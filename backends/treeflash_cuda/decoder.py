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

from collections.abc import Callable, Collection
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash_cuda.decoder_facts import DecoderFacts
from treeflash_cuda.decoder_operations import Attention, DecoderOperations, Rotation

Read: TypeAlias = Callable[[str, tuple[int, ...]], Tensor]
"""Reads the tensor with a name, which must have this shape."""


class DecoderLayer(nn.Module):
    """One layer; `read` finds its tensors by the names of transformers' layers."""

    def __init__(
        self, facts: DecoderFacts, index: int, operations: DecoderOperations, read: Read
    ) -> None:
        super().__init__()
        self.facts, self.operations, self.index = facts, operations, index
        self.window, self.is_rotated = facts.windows[index], facts.rotated[index]
        size, inner, d = facts.hidden_size, facts.intermediate_size, facts.head_dim
        q, kv = facts.heads * d, facts.kv_heads * d

        def linear(place: str, width: int, **outputs: int) -> nn.Module:
            """Join the layers with these names and numbers of outputs."""
            weights = [read(f"{place}.{x}.weight", (n, width)) for x, n in outputs.items()]
            biases = [
                read(f"{place}.{x}.bias", (n,)) if x in facts.biases else None
                for x, n in outputs.items()
            ]
            return operations.linear(weights, biases)

        self.qkv = linear("self_attn", size, q_proj=q, k_proj=kv, v_proj=kv)
        self.o_proj = linear("self_attn", q, o_proj=size)
        self.gate_up = linear("mlp", size, gate_proj=inner, up_proj=inner)
        self.down_proj = linear("mlp", inner, down_proj=size)
        self.input_norm = constant(read("input_layernorm.weight", (size,)))
        self.network_norm = constant(read("post_attention_layernorm.weight", (size,)))
        self.head_norms: Tensor | None = None  # of queries, then of keys, a row for each head
        if facts.norms_heads:
            q_norm, k_norm = (read(f"self_attn.{x}_norm.weight", (d,)) for x in ("q", "k"))
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
        queries = ops.rotate_and_store(
            heads,
            facts.kv_heads,
            rotation if self.is_rotated else None,
            self.head_norms,
            facts.eps,
            lambda keys, values: attention.store(self.index, keys, values),
        )
        y = self.o_proj(attention.attend(self.index, queries, self.window))
        y, attended = ops.rms_norm(y, self.network_norm, facts.eps, x)
        return x, self.down_proj(ops.gated(self.gate_up(y))), attended


class Decoder(nn.Module):
    """The layers between embeddings and the output head, and both of them."""

    def __init__(self, facts: DecoderFacts, operations: DecoderOperations, read: Read) -> None:
        super().__init__()
        self.facts, self.operations = facts, operations
        table = facts.vocab_size, facts.hidden_size
        self.embeddings = nn.Embedding(
            *table, _weight=read("model.embed_tokens.weight", table), _freeze=True
        )

        def layer(n: int) -> DecoderLayer:
            of_layer = f"model.layers.{n}"
            return DecoderLayer(
                facts, n, operations, lambda name, shape: read(f"{of_layer}.{name}", shape)
            )

        self.layers = nn.ModuleList(map(layer, range(facts.layers)))
        self.norm = constant(read("model.norm.weight", (facts.hidden_size,)))
        # (vocab, hidden_size) of the output head, from which rows of some tokens are taken.
        self.head_weight = self.embeddings.weight.data
        if not facts.ties_head:
            self.head_weight = read("lm_head.weight", table)
        self.lm_head = operations.linear([self.head_weight], [None])

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
        y, residual = F.embedding(tokens, self.embeddings.weight), None
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
