"""The draft model: vLLM's DFlash backbone, and the conditional head of TreeFlash.

vLLM calls `forward` for the blocks of all requests, each the root and N masked slots, and then
`compute_logits` for the rows of the slots, request by request, and drafts the best token of each
row. The head needs the token before each slot. So `forward` keeps the tokens of the blocks, which
begin with the roots, and `compute_logits` goes from slot to slot: the best token of a slot is the
previous token of the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM, DFlashQwen3Model

from treeflash.drafters.heads.treeflash import NORM_EPS
from treeflash.drafters.heads.treeflash import PREFIX as TREEFLASH_PREFIX


class Head(nn.Module):
    """h' = h + correction([norm(embedding); u]), with u = norm(h): the head `swiglu` or `linear`.

    `tensors` are the head's, without prefix; `like` has the dtype and device of the weights.
    """

    def __init__(self, tensors: Mapping[str, Tensor], like: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor.to(like))
        self.has_gate = "ug.weight" in tensors

    def forward(self, embedded: Tensor, normed: Tensor) -> Tensor:
        """Return the (n, hidden_size) corrections, from the same shape of embeddings and of u."""
        weights: Any = self
        embedded = F.rms_norm(embedded, embedded.shape[-1:], weights.norm_weight, NORM_EPS)
        inputs = torch.cat([embedded, normed], -1)
        if self.has_gate:
            up, gate = F.linear(inputs, weights.ug_weight, weights.ug_bias).chunk(2, -1)
            inputs = up * F.silu(gate)
        return F.linear(inputs, weights.d_weight)


def norm_context_keys(model: DFlashQwen3Model, keys: Tensor) -> Tensor:
    """Normalise the (layers, positions, kv_heads, head_dim) keys of the context."""
    pairs = zip(model.layers, keys, strict=True)
    return torch.stack([layer.self_attn.k_norm(own) for layer, own in pairs])


class Backbone(DFlashQwen3Model):
    """vLLM's DFlash backbone without its final norm: the head corrects what the norm reads."""

    def _normalize_context_k(self, all_k: Tensor) -> Tensor:
        # vLLM hands `rms_norm` the weights of all layers. Its kernel for CPUs, `rms_norm` in
        # csrc/cpu/layernorm.cpp of 0.32, uses the first layer's for the keys of every layer.
        return (
            norm_context_keys(self, all_k) if all_k.is_cpu else super()._normalize_context_k(all_k)
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the (rows, hidden_size) outputs of the last layer."""
        hidden = self.embed_input_ids(input_ids) if input_embeds is None else input_embeds
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions=positions, hidden_states=hidden, residual=residual)
        assert residual is not None
        return hidden + residual


class TreeFlashDraftModel(DFlashQwen3ForCausalLM):
    """A DFlash drafter with a head of TreeFlash; without a head it drafts as DFlash does."""

    model_cls = Backbone

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.drafts = vllm_config.speculative_config.num_speculative_tokens  # N, slots of a block
        self.head: Head | None = None  # set when the weights are loaded
        self.block_tokens: Tensor | None = None  # the tokens of the last call, block by block

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the (rows, hidden_size) outputs of the blocks, before the final norm."""
        self.block_tokens = input_ids
        return super().forward(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute (requests * N, vocab) logits of slots, each after the best token of the last."""
        normed = self.model.norm(hidden_states)
        if self.head is None or self.block_tokens is None:
            return super().compute_logits(normed)
        slots = hidden_states.unflatten(0, (-1, self.drafts))
        normed = normed.unflatten(0, (-1, self.drafts))
        previous = self.block_tokens[:: 1 + self.drafts][: len(slots)]
        rows = []
        for slot in range(self.drafts):
            correction = self.head(self.model.embed_tokens(previous), normed[:, slot])
            logits = super().compute_logits(self.model.norm(slots[:, slot] + correction))
            rows.append(logits)
            previous = logits.argmax(-1)
        return torch.stack(rows, 1).flatten(0, 1)

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Select (requests * N,) the best token of each row."""
        return self.compute_logits(hidden_states).argmax(-1)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a published folder, whose names begin with `model.`, as DFlash's do not."""
        named = {name.removeprefix("model."): tensor for name, tensor in weights}
        head = {
            name.removeprefix(TREEFLASH_PREFIX): named.pop(name)
            for name in list(named)
            if name.startswith(TREEFLASH_PREFIX)
        }
        super().load_weights(named.items())
        if head:
            self.head = Head(head, self.model.norm.weight)
