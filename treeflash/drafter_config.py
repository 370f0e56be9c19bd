"""The shape of a drafter, whatever the format of its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """The shape of a drafter, from its checkpoint.

    Attributes:
        block_size: S slots: the root and S - 1 masks.
        mask_token_id: fills the positions to be drafted.
        target_layer_ids: target layers whose outputs are the context features, in order; -1 is the
            output of the embeddings.
        num_target_layers: depth of the target that it was trained for; None if not given.
        vocab_size: the target's vocabulary size; None if not given.
        head: name of the conditional head: `swiglu` or `linear` (TreeFlash), `selector` (DFlash2),
            `vanilla`, `gated` or `rnn` (DSpark), `domino`; None for a drafter of marginals alone.
        inv_freq: (head_dim // 2,) rotary inverse frequencies, radians per position.
        rope_scale: factor on the rotary cosines and sines; 1 except for YaRN.
        sliding_windows: per layer, the width of its window in positions, or None.
        causal: per layer, whether a position attends only to itself and earlier ones.
        input_scale: factor on the embeddings at the drafter's input.
        first_slot: of those that predict: 1 if slot k predicts token k after the root (DFlash), 0
            if it predicts token k + 1 (DSpark).
        window_from_root: a sliding layer sees the last window of positions before the root and the
            block, from every slot; not a window around each slot.
        conv_kernel_size: taps of the convolutions along a block (DFlash2); 0 without.
        conv_group_size: channels that share a coefficient that depends on the input.
        output_multiplier: factor on the drafter's logits.
        softcap: bound of the drafter's logits after the factor, by a hyperbolic tangent.
        own_vocabulary: whether the folder may hold embeddings and an output head.
        draft_vocab_size: tokens that the drafter can propose, if fewer than the target's.
        head_rank: inner width of the heads of DFlash2, DSpark and Domino.
        head_state_size: width of the state of the heads `rnn` and `domino`, which depend on all
            tokens of a path; 0 for the others.
        head_from_depth: the first depth that the head `domino` corrects.
        selector_top_k: candidates of a slot that the head `selector` scores.
        confidence_head: whether the head also predicts how much of its rows is right.
        confidence_with_markov: whether it reads the previous token too.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_bias: bool
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None
    vocab_size: int | None
    inv_freq: tuple[float, ...]
    rope_scale: float
    sliding_windows: tuple[int | None, ...]
    causal: tuple[bool, ...]
    head: str | None = None
    input_scale: float = 1.0
    first_slot: int = 1
    window_from_root: bool = False
    conv_kernel_size: int = 0
    conv_group_size: int = 1
    output_multiplier: float = 1.0
    softcap: float | None = None
    own_vocabulary: bool = False
    draft_vocab_size: int | None = None
    head_rank: int = 0
    head_state_size: int = 0
    head_from_depth: int = 1
    selector_top_k: int = 0
    confidence_head: bool = False
    confidence_with_markov: bool = False

    @property
    def depths(self) -> int:
        """Tokens that a block proposes one after another."""
        return self.block_size - self.first_slot
