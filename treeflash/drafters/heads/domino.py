"""The head of Domino: a correction of the logits by a GRU over the tokens of a block so far."""

from __future__ import annotations

from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.format import HeadFormat
from treeflash.drafters.heads.operations import Array, Module, RecurrentCell, Slots


class Domino(RecurrentCell):
    """Domino: z(b) + <W2[b], silu(W1 [u; s])>, where s is a GRU over the tokens' embeddings.

    Before the first depth of the head the bias is 0.
    """

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        h, rank, g = config.hidden_size, config.head_rank, config.head_state_size
        self.config = config
        self.prefix_gru = self.ops.gru(h, g)
        # The last one is no linear layer here: its rows are also taken for single tokens.
        self.embed_proj = self.ops.children(
            [
                self.ops.linear(h + g, rank, bias=False),
                self.ops.activation(),
                self.ops.embedding(vocab_size, rank),
            ]
        )

    @property
    def token_rows(self) -> Module:
        return self.embed_proj[2]

    def step(self, slots: Slots, state: Array, previous: Array, depth: int) -> tuple[Array, Array]:
        state = self.prefix_gru(slots.output.embed(previous), state)
        if depth + 1 < self.config.head_from_depth:
            return state, self.ops.zeros((len(state), self.config.head_rank), state)
        normed = self.of_paths(slots.at(depth), len(state))
        return state, self.ops.silu(self.embed_proj[0](self.ops.concatenate([normed, state], -1)))


HEADS = {
    "domino": HeadFormat(
        family="Domino",
        module=Domino,
        settings={"emb_dim": "head_rank", "gru_hidden_dim": "head_state_size"},
    )
}
