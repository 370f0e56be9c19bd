"""The head of X-PRESS, which mixes the slots of a block along a path."""

from __future__ import annotations

from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.heads.head_format import HeadFormat
from treeflash.drafters.heads.operations import Array, Module, OutputStage, RecurrentCell, Slots


class XPress(RecurrentCell):
    """X-PRESS: z(b) + <readout[b], x>, where x mixes the inputs of all slots of a path so far.

    The state has the projection of the block's mean, and then the input of each slot. The first
    slot's input comes from the token before the root.
    """

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        ops, h, r, slots = self.ops, config.hidden_size, config.head_rank, config.block_size
        inner = config.head_mlp_ratio * r
        self.token_embed = ops.embedding(vocab_size, r)
        self.down_h, self.down_g = ops.linear(h, r, bias=False), ops.linear(h, r, bias=False)
        self.in_proj = ops.linear(3 * r, r, bias=False)
        self.mix_l = ops.parameter(r, slots, slots)
        self.mlp_gate = ops.linear(r, inner, bias=False)
        self.mlp_up = ops.linear(r, inner, bias=False)
        self.mlp_down = ops.linear(inner, r, bias=False)
        # This is no linear layer: its rows are also taken for single tokens.
        self.readout = ops.embedding(config.draft_vocab_size or vocab_size, r)

    @property
    def token_rows(self) -> Module:
        return self.readout

    def start(self, output: OutputStage, hidden: Array, before: Array) -> Array:
        normed = output.norm(hidden)
        inputs = super().start(output, hidden, before).reshape(len(hidden), -1, len(self.mix_l))
        inputs[:, 0] = self.down_g(normed.mean(1))
        inputs[:, 1] = self._input(inputs, normed[:, 0], before)
        return inputs.reshape(len(hidden), -1)

    def step(self, slots: Slots, state: Array, previous: Array, depth: int) -> tuple[Array, Array]:
        inputs = self.ops.copy(state.reshape(len(state), -1, len(self.mix_l)))
        slot = depth + 1
        new = self._input(inputs, slots.at(depth), previous)
        inputs[:, 1 + slot] = new
        mix = self.mix_l[:, slot, : slot + 1]
        x = new + self.ops.einsum("njr,rj->nr", inputs[:, 1 : slot + 2], mix)
        x = x + self.mlp_down(self.ops.silu(self.mlp_gate(x)) * self.mlp_up(x))
        return inputs.reshape(len(state), -1), x

    def _input(self, inputs: Array, normed: Array, previous: Array) -> Array:
        """Return the (n, r) inputs of a slot after (n,) previous tokens, from (blocks, h) u."""
        embedded = self.token_embed(previous)
        hidden = self.of_paths(self.down_h(normed), len(previous))
        return self.in_proj(self.ops.concatenate([hidden, inputs[:, 0], embedded], -1))


HEADS = {
    "xpress": HeadFormat(
        family="X-PRESS",
        module=XPress,
        prefix="refiner_head.",
        settings={"xpress_rank": "head_rank", "xpress_mlp_ratio": "head_mlp_ratio"},
    )
}
