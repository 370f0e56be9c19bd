"""The configuration of a drafter of any format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from treeflash.config import SINK

LayerKind: TypeAlias = tuple[int | None, bool]
"""The window of a layer of a block drafter, None for all positions, and whether it is causal."""


@dataclass(frozen=True, kw_only=True)
class DrafterShape:
    """What every drafter has: the shape of its layers, what they read, and its output."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_bias: bool
    # target layers whose outputs are the context features, in order; -1 is the output of the
    # embeddings
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None  # depth of the target that it was trained for; None if not given
    vocab_size: int | None  # the target's vocabulary size; None if not given
    # (head_dim // 2,) rotary inverse frequencies, radians per position; the last ones are 0 if only
    # the first channels of a head are rotated, which `arrange_block` reorders
    inv_freq: tuple[float, ...]
    rope_scale: float  # factor on the rotary cosines and sines; 1 except for YaRN
    # per layer, the width of its window in positions, or None
    sliding_windows: tuple[int | None, ...]
    causal: tuple[bool, ...]  # per layer, whether a slot attends only to itself and earlier slots
    # per inverse frequency, the axis of rotary positions (0 time, 1 height, 2 width) that turns its
    # channels; None if they have one axis
    rotary_axes: tuple[int, ...] | None = None
    # whether the attention's output is multiplied by a sigmoid gate, which the stored `q_proj` has
    # behind the queries of each head
    gated: bool = False
    norm_offset: float = 0.0  # added to the stored weights of the norms
    # whether the layers are Gemma 4's: their values are normed, their scores not scaled, and their
    # sublayers' outputs normed too
    gemma4: bool = False
    # whether these values are the projected keys, so that there is no `v_proj`
    keys_are_values: bool = False
    input_scale: float = 1.0  # factor on the embeddings at the drafter's input
    # name of the conditional head, a key of `treeflash.drafters.formats.HEADS`, or of the kind of
    # head that drafts depth by depth; None for a drafter of marginals
    head: str | None = None
    output_multiplier: float = 1.0  # factor on the drafter's logits
    # bound of the drafter's logits after the factor, by a hyperbolic tangent
    softcap: float | None = None
    own_vocabulary: bool = False  # whether the folder may hold embeddings and an output head
    # number of tokens that the drafter can propose; None is all of them
    draft_vocab_size: int | None = None

    @property
    def depths(self) -> int:
        """D, the depths that a draft has at most."""
        raise NotImplementedError

    @property
    def has_marginals(self) -> bool:
        """Whether all depths come from one pass, with distributions that ignore the drafts."""
        raise NotImplementedError

    @property
    def scratch_rows(self) -> int:
        """Columns of the KV cache that a draft writes after the committed positions."""
        raise NotImplementedError

    @property
    def column_size(self) -> int:
        """Numbers that the KV cache keeps for each position."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    @property
    def groups(self) -> int:
        """Heads that share a key head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def attention_scale(self) -> float:
        """Factor on the scores of the attention."""
        return 1.0 if self.gemma4 else self.head_dim**-0.5


@dataclass(frozen=True, kw_only=True)
class DrafterConfig(DrafterShape):
    """The shape of a block drafter, from its checkpoint."""

    block_size: int  # S, the slots of a block: the root and S - 1 masks
    mask_token_id: int  # the token in the slots after the root
    # whether the softmax of each query head has one more logit, of a key without a value
    attention_sinks: bool = False
    # whether rotary pairs are neighbouring channels (2i, 2i + 1) in the stored tensors, instead of
    # the halves of a head; `arrange_block` reorders them
    interleaved_rope: bool = False
    # the first slot that predicts a token. 1: slot k predicts token k after the root (DFlash); 0:
    # slot k predicts token k + 1 (DSpark)
    first_slot: int = 1
    # whether all slots of a sliding layer see the block and one window of positions before the
    # root, instead of a window around each slot
    window_from_root: bool = False
    # taps of the convolutions along a block (DFlash2); 0 without convolutions
    conv_kernel_size: int = 0
    conv_group_size: int = 1  # channels that share a coefficient of these convolutions
    head_rank: int = 0  # inner width of the heads of DFlash2, DSpark and Domino
    # width of the state of the heads `rnn` and `domino`, which depend on all tokens of a path; 0
    # for other heads
    head_state_size: int = 0
    head_from_depth: int = 1  # the first depth that the head `domino` corrects
    selector_top_k: int = 0  # candidates of a slot that the head `selector` scores
    # whether there is a head that predicts the acceptance of each token
    confidence_head: bool = False
    confidence_with_markov: bool = False  # whether the confidence head reads the previous token too

    @property
    def depths(self) -> int:
        return self.block_size - self.first_slot

    @cached_property
    def layer_kinds(self) -> list[LayerKind]:
        """By layer, which positions its slots see."""
        return list(zip(self.sliding_windows, self.causal, strict=True))

    @property
    def extensions(self) -> dict[str, tuple[str, bool]]:
        """By field, what its layers or logits may have beyond DFlash's, and whether they have."""
        return {
            "output_multiplier": ("a factor on its logits", self.output_multiplier != 1),
            "softcap": ("a softcap", self.softcap is not None),
            "interleaved_rope": ("interleaved rotary embeddings", self.interleaved_rope),
            "gated": ("gated queries", self.gated),
            "attention_sinks": ("attention sinks", self.attention_sinks),
            "gemma4": ("Gemma 4's layers", self.gemma4),
        }

    @property
    def has_marginals(self) -> bool:
        return True

    @property
    def scratch_rows(self) -> int:
        return self.block_size


def window_gap(start: int, window: int | None) -> tuple[int, int]:
    """Return the gap between the first `SINK` positions and the `window` before `start`.

    It is (first, end), empty if `window` is None.
    """
    return (SINK, max(SINK, start - window)) if window is not None else (0, 0)
