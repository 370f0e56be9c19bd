"""Gemma 4's assistant: a drafter that reads the keys and values of its target.

A step reads the embedding of a token and the target's state at the position before it, and gives
the logits of the next token and, in place of that state, what the next step reads. All steps of a
draft have the root's position and see the committed positions alone, so that nothing is written,
and drafts do not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.gemma4_text import DecoderLayer, ModelArgs

from treeflash.decoding.backend_base import note_drafted, project_contexts
from treeflash.decoding.mtp_head import (
    CacheColumns,
    DraftedColumns,
    MtpBlock,
    MtpHead,
    MtpRows,
    root_blocks,
    unread_states,
)
from treeflash.drafters.mtp_heads import Assistant, MtpConfig
from treeflash.errors import UnsupportedModelError
from treeflash_mlx.cache import KVCache
from treeflash_mlx.drafter import OutputStage
from treeflash_mlx.drafter_model import OwnVocabulary, VocabularyOwner
from treeflash_mlx.mtp_head import MtpDrafter
from treeflash_mlx.target import Target


class Clusters(nn.Module):
    """Tokens in clusters of one size; only the best clusters get logits."""

    def __init__(self, shape: Assistant, width: int, vocab_size: int) -> None:
        super().__init__()
        self.scored = shape.scored
        self.centroids = nn.Linear(width, shape.clusters, bias=False)
        self.token_ordering = mx.arange(vocab_size)

    def __call__(self, normed: mx.array, logits: mx.array) -> mx.array:
        """Return (n, vocab) logits of (n, width) outputs, -inf outside the best clusters."""
        ranks = self.centroids(normed)
        best = mx.argpartition(-ranks, self.scored - 1, axis=-1)[:, : self.scored]
        tokens = self.token_ordering.reshape(ranks.shape[1], -1)[best].reshape(len(normed), -1)
        kept = mx.take_along_axis(logits, tokens, -1)
        return mx.put_along_axis(mx.full(logits.shape, -mx.inf, logits.dtype), tokens, kept, -1)


class AssistantModel(VocabularyOwner):
    """The weights of an assistant; its layers are mlx-lm's, without their keys and values."""

    def __init__(
        self, config: MtpConfig, shape: Assistant, own: OwnVocabulary, target: Target
    ) -> None:
        super().__init__()
        count, width = len(shape.settings["layer_types"]), int(shape.settings["hidden_size"])
        settings = {**shape.settings, "num_kv_shared_layers": count}
        args = ModelArgs.from_dict({**settings, "hidden_size_per_layer_input": 0})
        self.config, self.window = config, args.sliding_window
        self.pre_projection = nn.Linear(2 * config.hidden_size, width, bias=False)
        self.post_projection = nn.Linear(width, config.hidden_size, bias=False)
        self.layers = [DecoderLayer(args, n) for n in range(count)]
        self.norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.masked_embedding = None
        if shape.clusters:
            self.masked_embedding = Clusters(shape, width, target.vocab_size)
        self._own = own
        self._sources = [self._source(layer, target) for layer in self.layers]
        for layer in self.layers:  # only the thread that makes a lazy array can evaluate it
            mx.eval(getattr(layer.self_attn.rope, "_freqs", []))

    def project(self, features: mx.array) -> mx.array:
        """Project the (n, hidden_size) states: the target's, as they are."""
        return features

    def __call__(self, embedded: mx.array, states: mx.array, caches: Sequence[KVCache]) -> mx.array:
        """Return (n, width) outputs of the last layer, from (n, hidden_size) embeddings and states.

        The rows belong to the sequences of these KV caches of the target, equally many to each.
        """
        x = self.pre_projection(mx.concatenate([embedded, states], -1))
        lengths = [cache.length for cache in caches]
        positions = mx.array(np.repeat(lengths, len(x) // len(caches)), mx.int32)
        for layer, source in zip(self.layers, self._sources, strict=True):
            y = self._attend(layer.self_attn, layer.input_layernorm(x), positions, caches, source)
            x = x + layer.post_attention_layernorm(y)
            y = layer.mlp(layer.pre_feedforward_layernorm(x))
            x = (x + layer.post_feedforward_layernorm(y)) * layer.layer_scalar
        return x

    def feedback(self, outputs: mx.array) -> mx.array:
        """Return the (n, hidden_size) states that the next steps read."""
        return self.post_projection(self.norm(outputs))

    def _source(self, layer: Any, target: Target) -> int:
        """Find the last layer of the target that has its own keys for a layer of this kind."""
        found = [
            n
            for n, other in enumerate(target.layers)
            if getattr(getattr(other, "self_attn", None), "has_kv", False)
            and other.layer_type == layer.layer_type
            and other.self_attn.head_dim == layer.self_attn.head_dim
        ]
        if not found:
            raise UnsupportedModelError(
                f"Gemma 4's assistant reads keys that this {target.family} target does not have; "
                "use the target that it was made for"
            )
        return found[-1]

    def _attend(
        self,
        attention: Any,
        y: mx.array,
        positions: mx.array,
        caches: Sequence[KVCache],
        source: int,
    ) -> mx.array:
        """Attend from rows to the committed positions of their sequences: (n, width)."""
        q = attention.q_norm(attention.q_proj(y).reshape(len(y), attention.n_heads, 1, -1))
        queries = mx.split(attention.rope(q, offset=positions).swapaxes(0, 2), len(caches), 2)
        out = []
        for part, cache in zip(queries, caches, strict=True):
            # As in transformers, the window is counted before the root.
            first = max(cache.length - self.window - 1, 0) if attention.is_sliding else 0
            columns = [x[:, :, first:] for x in cache.first_columns(source, cache.length)]
            keys: Any = columns[0]
            values: Any = columns[-1]
            if cache.quantisation is not None:  # numbers, scales and biases of each
                keys, values = columns[:3], columns[3:]
            attended = scaled_dot_product_attention(
                part, keys, values, cache=cache.quantisation, scale=1.0, mask=None
            )
            out.append(attended[0].swapaxes(0, 1).reshape(part.shape[2], -1))
        return attention.o_proj(mx.concatenate(out))


class AssistantOutput(OutputStage):
    """The target's embeddings as its layers read them, and the assistant's own logits."""

    def __init__(self, model: AssistantModel, target: Target) -> None:
        super().__init__(model, target)
        self._clusters, self._scale = model.masked_embedding, model.config.hidden_size**0.5

    def embed(self, tokens: mx.array) -> mx.array:
        return super().embed(tokens) * self._scale

    def logits(self, normed: mx.array, tokens: mx.array | None = None) -> mx.array:
        logits = super().logits(normed, tokens)
        return logits if self._clusters is None else self._clusters(normed, logits)


class AssistantDrafter(MtpDrafter):
    """`treeflash.decoding.interfaces.Drafter` in MLX: the first step of every draft."""

    def __init__(self, model: AssistantModel, target: Target) -> None:
        self.model, self.output = model, AssistantOutput(model, target)

    def draft(self, roots: Sequence[tuple[Any, int]], depths: int | None = None) -> list[MtpBlock]:
        """Run the roots of all sequences together."""
        project_contexts([state for state, _ in roots], self.model.project, mx.concatenate)
        states = []
        for state, _ in roots:
            state.drafter.write_states(unread_states(state))
            states.append(state.drafter.states(state.length - 1, state.length))
        caches = [state.kv_cache for state, _ in roots]
        tokens = mx.array([root for _, root in roots], mx.int32)
        outputs = self.model(self.output.embed(tokens), mx.concatenate(states), caches)
        note_drafted(state for state, _ in roots)
        blocks = root_blocks(
            roots, list(mx.split(outputs, len(roots))), depths, self.model.config.depths
        )
        return [replace(x, cache=cache) for x, cache in zip(blocks, caches, strict=True)]


class AssistantHead(MtpHead):
    """`treeflash.decoding.interfaces.ARHead` in MLX, one step of an `AssistantModel` a depth."""

    def _step(
        self,
        columns: DraftedColumns,
        rows: MtpRows,
        depth: int,
        tokens: mx.array,
        parents: mx.array,
    ) -> MtpRows:
        assert isinstance(columns, CacheColumns)
        batch, before = len(tokens), len(rows.outputs) // len(tokens)
        places = (parents + before * mx.arange(batch)[:, None]).reshape(-1)
        states = self.model.feedback(rows.outputs[places])
        embedded = self.output.embed(tokens.reshape(-1))
        caches = [block.cache for block in columns.blocks]
        return MtpRows(self.model(embedded, states, caches))
