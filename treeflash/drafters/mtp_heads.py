"""Heads that draft depth by depth: what MTP and EAGLE-3 heads are.

An MTP head is one transformer layer over *rows*, and so is an EAGLE-3 head. Row i reads the
embedding of the token at position i + 1 and the target's state at position i, and predicts the
token at position i + 2. A drafted token becomes a row with the state that the head computed at its
parent's row, so every depth costs one pass of the layer and of the output head.

Gemma 4's assistant has several layers and no rows: they read the keys and values of the target's
committed positions, so that the state which a draft passes on is all that its children need.

`treeflash.drafters.mtp_formats` has the formats in which they are published, and
`treeflash.drafters.mtp_tensors` their tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from treeflash.config import LoadConfig
from treeflash.drafters.config import DrafterShape
from treeflash.drafters.format import Config
from treeflash.errors import ConfigError, UnsupportedModelError

DEPTHS = 8
"""Depths that an MTP head drafts at most. Each costs a pass, and acceptance falls with depth."""
MAX_PATHS = 16
"""Paths that are expanded at each depth at most; EAGLE-2's published trees expand 8 to 10."""
NO_MARGINALS = (
    "methods dflash and ddtree need a drafter that predicts all depths in one pass; with an MTP or "
    "EAGLE-3 head use method treeflash or treeflash-chain"
)


@dataclass(frozen=True, kw_only=True)
class MtpExperts:
    """A mixture of experts in an MTP head's layer."""

    count: int  # number of experts; `per_token` of them run for a token
    per_token: int
    width: int  # inner width of an expert
    shared_width: int  # inner width of the expert that runs for every token
    shared_gate: bool  # whether the shared expert is weighed by a sigmoid of its own
    sigmoid: bool  # whether the router's scores are sigmoids, chosen with a bias; else a softmax
    normalised: bool  # whether the weights of a token's experts are divided by their sum
    scale: float = 1.0  # factor on these weights
    groups: int = 1  # the experts of a row are in the best `chosen_groups` of these groups
    chosen_groups: int = 1


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Latent attention (DeepSeek-V2, arXiv 2405.04434): the widths of its projections.

    The KV cache has a latent for all heads, and a rotary key of `MtpConfig.head_dim` numbers.
    """

    query_rank: int  # inner width of the queries' projection; 0 for a plain one
    rank: int  # width of the latent
    key_dim: int  # width of the part of a key that follows from the latent
    value_dim: int
    interleaved: bool  # whether rotary pairs are neighbouring channels
    scale: float  # factor on the scores


@dataclass(frozen=True, kw_only=True)
class Assistant:
    """The layers of Gemma 4's assistant, which attend to the target's keys."""

    settings: Config  # the settings of the layers, `text_config` in `config.json`
    clusters: int = 0  # number of clusters of tokens; only the best get logits. 0: all tokens do
    scored: int = 0  # number of clusters that get logits


@dataclass(frozen=True, kw_only=True)
class MtpConfig(DrafterShape):
    """The shape of a head that drafts depth by depth."""

    # the layer's attention reads the normed embedding and state side by side (EAGLE-3), instead of
    # a projection of both (MTP)
    reads_both: bool
    # the residual of that attention is the normed state, not the state
    normed_residual: bool = False
    normed_feedback: bool  # the state for the next depth is taken after the final norm
    qk_norm: bool = False  # queries and keys are normed by head
    output_bias: bool = False  # `o_proj` has a bias, as q, k and v have with `attention_bias`
    experts: MtpExperts | None = None  # experts of the feed-forward network; None if it is dense
    latent: Latent | None = None  # None for attention with keys and values of each head
    # norms before `fc`: of each feature, of all features together, or none
    feature_norms: Literal["each", "all"] | None = None
    # the states come after the target's final norm; else from `target_layer_ids` and through `fc`
    final_state: bool = False
    # P-EAGLE: all depths come from one pass, over the root's row and rows of this token; None for
    # heads that draft depth by depth
    mask_token_id: int | None = None
    parallel_depths: int = 0  # depths that P-EAGLE drafts in one pass
    # the layers of Gemma 4's assistant, which has no layer with keys of its own
    # (`num_hidden_layers` is 0); None for other heads
    assistant: Assistant | None = None

    @property
    def depths(self) -> int:
        return self.parallel_depths or DEPTHS

    @property
    def has_marginals(self) -> bool:
        return self.mask_token_id is not None

    @property
    def scratch_rows(self) -> int:
        if self.has_marginals:
            return self.depths
        return 0 if self.assistant else 1 + MAX_PATHS * (self.depths - 1)

    @property
    def column_size(self) -> int:
        # A fork at any length needs the target's state at the position before.
        if self.latent is not None:
            return self.latent.rank + self.head_dim + self.hidden_size
        return super().column_size + self.hidden_size

    @property
    def attention_scale(self) -> float:
        return super().attention_scale if self.latent is None else self.latent.scale


def refuse_window(config: LoadConfig) -> None:
    """Raise a ConfigError for a window on the rows."""
    if config.draft_window is not None:
        raise ConfigError("draft_window is not supported with MTP and EAGLE-3 heads; remove it")


def refuse_missing_targets(config: DrafterShape, backend: str, *, latents: bool = False) -> None:
    """Raise an UnsupportedModelError for a drafter of targets that a backend does not run.

    `latents` says whether the backend runs latent attention.
    """
    if not isinstance(config, MtpConfig):
        return
    for name, part in (
        ("Gemma 4's assistant", config.assistant),
        ("a head with latent attention", None if latents else config.latent),
    ):
        if part is not None:
            raise UnsupportedModelError(
                f"{name} is not supported by the {backend} backend; use the mlx backend"
            )


def first_visible(config: MtpConfig, length: int, depth: int) -> int:
    """Return the first of `length` committed rows that rows of a depth see; the root's is last."""
    (window,) = config.sliding_windows
    return 0 if window is None else min(max(length + depth - window, 0), length)


def hidden_depths(config: MtpConfig, depth: int) -> int:
    """Return at how many of the first depths drafted rows are too far to be seen from a depth."""
    (window,) = config.sliding_windows
    return 0 if window is None else max(depth - window, 0)
