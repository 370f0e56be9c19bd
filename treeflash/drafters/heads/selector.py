"""The selector of DFlash2, which scores the candidates of a slot."""

from __future__ import annotations

from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.format import HeadFormat
from treeflash.drafters.heads.operations import Array, ConditionalHead, Rows, ScoredTokens, Slots


class Selector(ConditionalHead):
    """DFlash2: U(b) + <A[a] * W u, B[b]> for the candidates b of a slot."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        rank = config.head_rank
        self.predecessor_codebook = self.ops.parameter(vocab_size, rank)
        self.successor_codebook = self.ops.parameter(vocab_size, rank)
        self.hidden_projection = self.ops.linear(config.hidden_size, rank, bias=False)
        self.candidates = config.selector_top_k

    def queries(self, slots: Slots, previous: Array, rows: Rows) -> Array:
        projected = self.hidden_projection(slots.normed)
        return self.ops.take(self.predecessor_codebook, previous) * self.ops.take(projected, rows)

    def score(self, queries: Array, scored: ScoredTokens) -> Array:
        return scored.candidate_products(queries, self.successor_codebook) + scored.logits()


HEADS = {
    "selector": HeadFormat(
        family="DFlash2",
        module=Selector,
        prefix="candidate_selector.",
        settings={
            "conv_kernel_size": "conv_kernel_size",
            "conv_group_size": "conv_group_size",
            "selector_rank": "head_rank",
            "selector_top_k": "selector_top_k",
        },
        training_name="selector",
    )
}
