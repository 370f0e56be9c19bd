"""A decoder in layers of our own, for inference.

A pass is a list of rows: each has a token, a rotary position, and an attention that knows which
keys it sees. Rows of several sequences are rows like others, so that everything but the attention
is the same for a lone token, a draft tree, a prompt and a batch of them:

    embed -> [ norm -> queries, keys, values -> rotate, store -> attend -> output
               norm -> gate and up -> activate -> down ] for each layer -> norm -> head

The first half of a layer is its mixer, in which rows read what other rows wrote. Attention reads
keys and values. A gated delta net reads a state instead, a matrix for each head: every row forgets
a part of the state of the row before it, and corrects what the state has for its key. In a draft
tree, the row before a node is its parent (`treeflash.decoding.hybrid`).

The second half is its network, with a gate; or several networks that a router chooses among.

The norms also add a sublayer's output to what it read: so a layer hands on both, and the next norm
adds them. Some families also norm what a sublayer adds. What differs between families is in
`DecoderFacts`, and what computes it in `DecoderOperations`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial, reduce
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash_cuda.decoder.facts import Rope
from treeflash_cuda.decoder.families import ATTENTION_GATE, DELTA_NET, NETWORK
from treeflash_cuda.decoder.operations import (
    Attention,
    Recurrences,
    Rotation,
    constant,
)
from treeflash_cuda.decoder.weights import DecoderWeights
from treeflash_cuda.experts import routed


class AttentionMixer(nn.Module):
    """Attention, whose output some families multiply with a gate."""

    def __init__(self, weights: DecoderWeights, index: int) -> None:
        super().__init__()
        self.facts = facts = weights.facts
        self.window = facts.windows[index]
        self.slot = facts.attention_layers.index(index)  # its number in the KV caches
        size, d = facts.hidden_size, facts.head_dim
        q, kv = facts.heads * d, facts.kv_heads * d
        place = f"{weights.place}.layers.{index}.self_attn"
        self.qkv = weights.linear(place, size, q_proj=q, k_proj=kv, v_proj=kv)
        self.gate: nn.Module | None = None
        if facts.gates_attention:
            self.gate = weights.linear(place, size, **{ATTENTION_GATE: q})
        self.o_proj = weights.linear(place, q, o_proj=size)
        self.head_norms: Tensor | None  # norms of queries, then of keys, a row for each head
        self.register_buffer("head_norms", None)  # no parameter: it is no matrix of a product
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

    def __init__(self, weights: DecoderWeights, index: int) -> None:
        super().__init__()
        facts = weights.facts
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


class Network(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(
        self,
        weights: DecoderWeights,
        place: str,
        inner: int,  # numbers between the products
        names: tuple[str, str, str] = NETWORK,
    ) -> None:
        super().__init__()
        self.operations, self.activation = weights.operations, weights.facts.activation
        size, (gate, up, down) = weights.facts.hidden_size, names
        self.gate_up = weights.linear(place, size, **{gate: inner, up: inner})
        self.down = weights.linear(place, inner, **{down: size})

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, hidden_size) rows to as many."""
        y: Tensor = self.down(self.operations.gated(self.gate_up(x), self.activation))
        return y


class ExpertNetwork(nn.Module):
    """The weighted sum of the networks that the router chooses for a row."""

    def __init__(self, weights: DecoderWeights, layer: str) -> None:
        super().__init__()
        facts = weights.facts
        assert facts.experts is not None
        self.facts = own = facts.experts
        place = f"{layer}.{own.place}"
        self.router = weights.linear(place, facts.hidden_size, gate=own.count)
        places = [f"{place}.experts.{n}" for n in range(own.count)]
        make = NetworkList if weights.operations.grouped_linear is None else JoinedNetworks
        self.experts: nn.Module = make(weights, places)
        self.shared: Network | None = None
        if (inner := own.shared_size) is not None:
            self.shared = Network(weights, f"{place}.shared_expert", inner)
            self.shared_gate = weights.linear(place, facts.hidden_size, shared_expert_gate=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, hidden_size) rows to as many; each row's sum has the order of its weights."""
        shares, chosen = self.router(x).float().softmax(-1).topk(self.facts.per_token)
        if self.facts.sums_to_one:
            shares = shares / shares.sum(-1, keepdim=True)
        y: Tensor = self.experts(x, chosen, shares.to(x.dtype))
        return y if self.shared is None else y + self.shared_gate(x).sigmoid() * self.shared(x)


class NetworkList(nn.ModuleList):
    """Experts that run one after the other, each with its rows."""

    def __init__(self, weights: DecoderWeights, places: Sequence[str]) -> None:
        """Read the experts at these places."""
        own = weights.facts.experts
        assert own is not None
        super().__init__(Network(weights, place, own.size, own.names) for place in places)

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Return the weighted sums of (n, k) experts of the rows."""
        experts, order = chosen.flatten().sort(stable=True)
        numbers, counts = experts.unique_consecutive(return_counts=True)
        rows = x.index_select(0, order // chosen.shape[1]).split(counts.tolist())
        outputs = [self[n](part) for n, part in zip(numbers.tolist(), rows, strict=True)]
        y = torch.cat(outputs).mul_(shares.flatten()[order, None])
        pairs = torch.empty_like(y).index_copy_(0, order, y).view(*chosen.shape, -1)
        return reduce(torch.add, pairs.unbind(1))


class JoinedNetworks(nn.Module):
    """Experts that one product multiplies, which reads nothing on the host."""

    def __init__(self, weights: DecoderWeights, places: Sequence[str]) -> None:
        """Read the experts at these places."""
        super().__init__()
        facts = weights.facts
        assert facts.experts is not None
        self.operations, self.activation = weights.operations, facts.activation
        size, inner = facts.hidden_size, facts.experts.size
        gate, up, down = facts.experts.names
        matrices = (
            weights.stacked(places, size, **{gate: inner, up: inner}),
            weights.stacked(places, inner, **{down: size}),
        )
        self.gate_up, self.down = map(constant, matrices)

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Return the weighted sums of (n, k) experts of the rows."""
        assert self.operations.grouped_linear is not None
        multiply = self.operations.grouped_linear(len(x))

        def network(pairs: Tensor, ends: Tensor) -> Tensor:
            inner = self.operations.gated(multiply(pairs, self.gate_up, ends), self.activation)
            return multiply(inner, self.down, ends)

        return routed(x, chosen, shares, len(self.down), network)


RunLayers: TypeAlias = Callable[
    [Tensor, Sequence[Rotation], Attention, Collection[int]],
    tuple[Tensor, Tensor | None, dict[int, Tensor]],
]
"""The type of `Decoder.run_layers`."""


class DecoderLayer(nn.Module):
    """One layer."""

    def __init__(self, weights: DecoderWeights, index: int) -> None:
        super().__init__()
        self.facts, self.operations = weights.facts, weights.operations
        facts = weights.facts
        kind = AttentionMixer if index in facts.attention_layers else GatedDeltaNet
        self.mixer: AttentionMixer | GatedDeltaNet = kind(weights, index)
        place = f"{weights.place}.layers.{index}"
        self.network: nn.Module
        if facts.experts is not None and index in facts.experts.layers:
            self.network = ExpertNetwork(weights, place)
        else:
            self.network = Network(weights, f"{place}.mlp", facts.intermediate_size)

        def norm(name: str | None) -> nn.Parameter | None:
            if name is None:
                return None
            return constant(weights.norm(f"{place}.{name}", facts.hidden_size))

        self.input_norm = norm(facts.norms.attention_input)
        self.attention_norm = norm(facts.norms.attention_output)
        self.network_norm = norm(facts.norms.network_input)
        self.output_norm = norm(facts.norms.network_output)

    def forward(
        self,
        y: Tensor,
        residual: Tensor | None,
        rotation: Rotation | None,
        attention: Attention,
        recurrences: Recurrences | None,  # None for a decoder without recurrent layers
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run (n, hidden_size) rows: `y` + `residual` is what the layer reads.

        Returns what it read, and the two parts of what it gives: its network's output, and the
        residual.
        """
        y, x = self._read(y, residual, self.input_norm)
        if isinstance(self.mixer, AttentionMixer):
            y = self.mixer(y, rotation, attention)
        else:
            assert recurrences is not None
            y = self.mixer(y, recurrences)
        y, attended = self._read(self._give(y, self.attention_norm), x, self.network_norm)
        return x, self._give(self.network(y), self.output_norm), attended

    def _read(
        self, y: Tensor, residual: Tensor | None, norm: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return what a sublayer reads, and the sum that it is the norm of."""
        if norm is not None:
            return self.operations.rms_norm(y, norm, self.facts.eps, residual)
        x = y if residual is None else y + residual
        return x, x

    def _give(self, y: Tensor, norm: Tensor | None) -> Tensor:
        """Return what a sublayer adds to the residual, from its output."""
        if norm is not None:
            y, _ = self.operations.rms_norm(y, norm, self.facts.eps)
        factor = self.facts.factors.sublayers
        return y if factor == 1 else y * factor


class Decoder(nn.Module):
    """The layers between embeddings and the output head, and both of them."""

    def __init__(self, weights: DecoderWeights) -> None:
        super().__init__()
        self.facts, self.operations = weights.facts, weights.operations
        facts = weights.facts
        table = facts.vocab_size, facts.hidden_size
        self.embeddings = weights.table(f"{weights.place}.embed_tokens", *table)
        self.layers = nn.ModuleList(DecoderLayer(weights, n) for n in range(facts.layers))
        self.norm = constant(weights.norm(f"{weights.place}.norm", facts.hidden_size))
        # transformers rounds this factor to the model's dtype, too.
        self.scale = torch.tensor(facts.factors.embeddings, dtype=weights.dtype)
        tied = self.embeddings if facts.ties_head else None
        self.lm_head, self.head_weight = weights.head("lm_head", tied, *table)

    def rotation(self, rope: Rope, positions: Tensor) -> Rotation:
        """Compute the rotation of (n,) positions."""
        angles = positions, rope.frequencies, rope.scale
        return self.operations.rotation(*angles, self.scale.dtype)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        captured: Collection[int],
        run_layers: RunLayers | None = None,  # runs the layers instead of their modules
        recurrences: Recurrences | None = None,  # None for a decoder without recurrent layers
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run (n,) tokens: the (n, hidden_size) that the head reads, and outputs of layers.

        `captured` are the indices of these layers: -1 stands for the embeddings, and the number of
        layers for the final norm.
        """
        rotations = [self.rotation(rope, positions) for rope in self.facts.ropes]
        x = self.embeddings(tokens)
        if self.facts.factors.embeddings != 1:
            x = x * self.scale
        run = run_layers or partial(self.run_layers, recurrences=recurrences)
        y, residual, outputs = run(x, rotations, attention, captured)
        normed, x = self.operations.rms_norm(y, self.norm, self.facts.eps, residual)
        last = len(self.layers)
        outputs |= {n: found for n, found in ((last - 1, x), (last, normed)) if n in captured}
        return normed, outputs

    def run_layers(
        self,
        x: Tensor,
        rotations: Sequence[Rotation],
        attention: Attention,
        captured: Collection[int],
        recurrences: Recurrences | None = None,
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """Run the layers' modules: what the final norm adds, and outputs of all but the last."""
        outputs = dict[int, Tensor]()
        y: Tensor = x
        residual: Tensor | None = None
        for n, (layer, rope) in enumerate(zip(self.layers, self.facts.rotated, strict=True)):
            rotation = None if rope is None else rotations[rope]
            x, y, residual = layer(y, residual, rotation, attention, recurrences)
            if n - 1 in captured:
                outputs[n - 1] = x
        return y, residual, outputs

    def logits(self, hidden: Tensor, count: int | None = None) -> Tensor:
        """Compute the (count, vocab_size) logits of the first rows that the head reads."""
        logits: Tensor = self.lm_head(hidden)[:count]
        divisor, cap = self.facts.factors.logits, self.facts.factors.logit_cap
        logits = logits if divisor == 1 else logits / divisor
        return logits if cap is None else self.operations.capped(logits, cap)
