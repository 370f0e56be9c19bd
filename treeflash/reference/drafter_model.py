"""The weights of a drafter."""

from __future__ import annotations

from dataclasses import dataclass

from treeflash.config import DrafterConfig
from treeflash.reference.cache import Cache
from treeflash.reference.numerics import Array, rms_norm
from treeflash.reference.target import Target


@dataclass(frozen=True, eq=False)
class DrafterModel:
    """A drafter's tensors, with the target that it drafts for.

    Attributes:
        config: the drafter's shape.
        tensors: of the backbone, by canonical name.
        head_tensors: of the AR head, by name without `ar_approximation.`.
        target: gives the embeddings and the output head.
    """

    config: DrafterConfig
    tensors: dict[str, Array]
    head_tensors: dict[str, Array]
    target: Target

    @property
    def feature_size(self) -> int:
        """Width of the features of a position."""
        return len(self.config.target_layer_ids) * self.config.hidden_size

    def new_cache(self) -> Cache:
        """An empty cache for a text."""
        config = self.config
        return Cache(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)

    def normed(self, name: str, x: Array) -> Array:
        """RMS-normalise with the weights of that name."""
        return rms_norm(x, self.tensors[name + ".weight"], self.config.rms_norm_eps)

    def logits(self, hidden: Array) -> Array:
        """The target's output head over last-layer outputs."""
        return self.target.output_head(self.normed("norm", hidden))
