"""A decoder in layers of our own, for inference.

A pass is a list of rows: each has a token, a rotary position, and an attention that knows which
keys it sees. Rows of several sequences are rows like others, so that everything but the attention
is the same for a lone token, a draft tree, a prompt and a batch of them:

    embed -> [ norm -> queries, keys, values -> rotate, store -> attend -> output
               norm -> gate and up -> activate -> down ] for each layer -> norm -> head

The first half of a layer is its mixer, which may also be a recurrent one (`mixers`).

The norms also add a sublayer's output to what it read: so a layer hands on both, and the next norm
adds them. Some families also norm what a sublayer adds. What differs between families is in
`DecoderFacts`, and what computes it in `DecoderOperations`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from treeflash_cuda.decoder.facts import DecoderFacts, Rope
from treeflash_cuda.decoder.mixers import AttentionMixer, GatedDeltaNet
from treeflash_cuda.decoder.network import ExpertNetwork, Network
from treeflash_cuda.decoder.operations import (
    Attention,
    DecoderOperations,
    Recurrences,
    Rotation,
    Weights,
    constant,
)

RunLayers: TypeAlias = Callable[
    [Tensor, Sequence[Rotation], Attention, Collection[int]],
    tuple[Tensor, Tensor | None, dict[int, Tensor]],
]
"""The type of `Decoder.run_layers`."""


class DecoderLayer(nn.Module):
    """One layer."""

    def __init__(
        self, facts: DecoderFacts, index: int, operations: DecoderOperations, weights: Weights
    ) -> None:
        super().__init__()
        self.facts, self.operations = facts, operations
        kind = AttentionMixer if index in facts.attention_layers else GatedDeltaNet
        self.mixer: AttentionMixer | GatedDeltaNet = kind(facts, index, weights)
        place = f"{weights.place}.layers.{index}"
        self.network: nn.Module
        if facts.experts is not None and index in facts.experts.layers:
            self.network = ExpertNetwork(facts, operations, weights, place)
        else:
            inner = facts.intermediate_size
            self.network = Network(facts, operations, weights, f"{place}.mlp", inner)

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

    def __init__(
        self, facts: DecoderFacts, operations: DecoderOperations, weights: Weights
    ) -> None:
        super().__init__()
        self.facts, self.operations = facts, operations
        table = facts.vocab_size, facts.hidden_size
        self.embeddings = weights.table(f"{weights.place}.embed_tokens", *table)
        self.layers = nn.ModuleList(
            DecoderLayer(facts, n, operations, weights) for n in range(facts.layers)
        )
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
