"""The heads of TreeFlash (arXiv 2606.03819): h' = h + correction, read by the output head."""

from __future__ import annotations

from functools import partial

from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.format import HeadFormat
from treeflash.drafters.heads.operations import Array, ConditionalHead, Rows, ScoredTokens, Slots

PREFIX = "ar_approximation."
NORM_EPS = 1e-6


class Corrected(ConditionalHead):
    """TreeFlash: h' = h + correction([embedding; u]), read by the output head."""

    def correction(self, embedded: Array, normed: Array, rows: Rows) -> Array:
        """Return (n, hidden_size) corrections, from (n, hidden_size) embeddings of previous tokens.

        `rows` are their rows of the (slots, hidden_size) u.
        """
        raise NotImplementedError

    def queries(self, slots: Slots, previous: Array, rows: Rows) -> Array:
        correction = self.correction(slots.output.embed(previous), slots.normed, rows)
        return slots.output.norm(self.ops.take(slots.hidden, rows) + correction)

    def score(self, queries: Array, scored: ScoredTokens) -> Array:
        return scored.output_logits(queries)


class SwiGLU(Corrected):
    """The correction D(silu(G(x)) * U(x))."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        h = config.hidden_size
        self.norm = self.ops.rms_norm(h, NORM_EPS)
        self.ug = self.ops.pair_linear(h, 2 * inner_size, bias=True)
        self.d = self.ops.linear(inner_size, h, bias=False)

    def correction(self, embedded: Array, normed: Array, rows: Rows) -> Array:
        up, gate = self.ops.split(self.ug(self.norm(embedded), normed, rows), 2)
        return self.d(up * self.ops.silu(gate))


class Linear(Corrected):
    """The paper's ablation D(x), linear in the previous token and the hidden state."""

    def __init__(self, config: DrafterConfig, inner_size: int, vocab_size: int) -> None:
        super().__init__(config, inner_size, vocab_size)
        h = config.hidden_size
        self.norm = self.ops.rms_norm(h, NORM_EPS)
        self.d = self.ops.pair_linear(h, h, bias=False)

    def correction(self, embedded: Array, normed: Array, rows: Rows) -> Array:
        return self.d(self.norm(embedded), normed, rows)


_head = partial(
    HeadFormat, family="TreeFlash", prefix=PREFIX, settings={"ar_approximation": "head"}
)
HEADS = {
    "swiglu": _head(module=SwiGLU, training_name="swiglu"),
    "linear": _head(module=Linear, training_name="linear"),
}
