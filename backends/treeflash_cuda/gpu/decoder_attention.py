"""The attention of a decoder's pass on a GPU, over the columns of a slab.

`TreeAttention` is for rows of any sequences, in a pass that a CUDA graph can replay.
`PromptAttention` is for long parts of prompts, by a kernel that is faster for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from treeflash_cuda.cache import SeenColumns, Slab
from treeflash_cuda.decoder.facts import DecoderFacts
from treeflash_cuda.decoder.operations import Rotation
from treeflash_cuda.gpu.kernels import CausalAttention
from treeflash_cuda.numerics import concatenate
from treeflash_cuda.operations import Operations
from treeflash_cuda.visible_keys import VisibleKeys


@dataclass(eq=False)
class SlabAttention:
    """The half of `Attention` that comes before attending: one operation for a layer's heads."""

    facts: DecoderFacts
    operations: Operations
    unrotated: Rotation  # (1, head_dim) cosines and sines of layers that do not rotate
    slab: Slab  # the slab of all sequences
    slots: Tensor  # (n,) column of each row's own key

    def turn(
        self,
        layer: int,
        heads: Tensor,
        rotation: Rotation | None,
        norms: Tensor | None,
        eps: float,
    ) -> Tensor:
        facts, operations = self.facts, self.operations
        q, k, v = heads.split([facts.heads, facts.kv_heads, facts.kv_heads], 1)
        of_heads = None
        if norms is not None and facts.norms_heads == "all":
            weights = norms.tensor_split([facts.heads])
            q, k = (
                operations.rms_norm(x.flatten(1), weight.flatten(), eps)[0].view(x.shape)
                for x, weight in zip((q, k), weights, strict=True)
            )
        elif norms is not None:
            of_heads = norms[0], norms[-1]
        angles = rotation or [x.expand(len(heads), -1) for x in self.unrotated]
        rotated: Tensor = self.operations.rotate_and_store(
            *(q, k, v, *angles, *self.slab.layer(layer), self.slots), norms=of_heads, eps=eps
        )
        return rotated


@dataclass(eq=False)
class TreeAttention(SlabAttention):
    """`Attention` of nodes of draft trees, and of next tokens."""

    keys: VisibleKeys  # the keys that rows see in layers without a window
    _within: dict[int, VisibleKeys] = field(default_factory=dict)  # in layers with one

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        keys = self.keys
        if window is not None:
            if window not in self._within:
                self._within[window] = keys.within(window)
            keys = self._within[window]
        output: Tensor = self.operations.tree_attention(
            *(queries, *self.slab.layer(layer), keys),
            scale=self.facts.score_scale,
            softcap=self.facts.factors.score_cap,
        )
        return output.flatten(1)


@dataclass(eq=False)
class PromptAttention(SlabAttention):
    """`Attention` of the last tokens of some sequences, which attend one after the other."""

    sizes: Sequence[int]  # rows of each sequence
    seen: Sequence[SeenColumns]  # the columns of each sequence, up to its last row's
    kernel: CausalAttention

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        scale, outputs = self.facts.score_scale, []
        for q, columns in zip(queries.split(self.sizes), self.seen, strict=True):
            keys, values = (x[0].transpose(0, 1) for x in columns.layer(layer))
            outputs.append(self.kernel(q, keys, values, window, scale))
        return concatenate(outputs).flatten(1)
