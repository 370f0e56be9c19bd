"""The weights of a one-shot drafter (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treeflash.drafters.block_model import BlockModel
from treeflash.drafters.config import DrafterConfig, DrafterShape
from treeflash_cuda.drafter_operations import OPERATIONS, Float32Module, Rotation
from treeflash_cuda.low_bit_linear import LowBitLinear
from treeflash_cuda.operations import Operations
from treeflash_cuda.target import Target

if TYPE_CHECKING:
    from treeflash_cuda.cpu.drafter_calls import BlockCalls


class Rotary(Float32Module):
    """Cosines and sines of positions, from frequencies in float32 whatever the model's dtype."""

    inv_freq: Tensor

    def __init__(self, config: DrafterShape) -> None:
        super().__init__()
        self.scale = config.rope_scale
        inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32, device="cpu")
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Return the (..., n, head_dim) each, from (..., n) positions."""
        return self.turn(positions[..., None], dtype)

    def turn(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Return the same from the position of each frequency: (..., n, head_dim / 2)."""
        angles = positions.float() * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


class OwnVocabulary(nn.Module):
    """The tensors that a drafter has instead of the target's; None for each that it shares."""

    embeddings: Tensor | None  # (vocab, hidden_size)
    lm_head: Tensor | None  # (Vd, hidden_size)
    token_ids: Tensor | None  # (Vd,) the target's ids of the tokens that the drafter can propose

    def __init__(self, **tensors: Tensor | None) -> None:
        super().__init__()
        for name in ("embeddings", "lm_head", "token_ids"):
            self.register_buffer(name, tensors.get(name), persistent=False)
        # A quantised copy of the output head, for logits of all tokens.
        self.quantised_lm_head: nn.Module | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], target: Target) -> OwnVocabulary:
        """Take `embed_tokens.weight`, `lm_head.weight` and `d2t` that are not the target's."""

        def weight(name: str, shared: Tensor | LowBitLinear | None) -> Tensor | None:
            if name not in tensors:
                return None
            tensor = tensors[name].to(target.device, target.dtype)
            return None if isinstance(shared, Tensor) and torch.equal(tensor, shared) else tensor

        token_ids = None
        if (offsets := tensors.get("d2t")) is not None:
            token_ids = (offsets + torch.arange(len(offsets))).to(target.device, offsets.dtype)
        return cls(
            embeddings=weight("embed_tokens.weight", target.embeddings),
            lm_head=weight("lm_head.weight", target.lm_head_weight),
            token_ids=token_ids,
        )


class DrafterModel(BlockModel, nn.Module):
    """The model as a module of PyTorch, with the rotations of its rows and its own vocabulary."""

    ops = OPERATIONS
    operations: Operations | None = None  # for rows; None attends with masks
    calls: BlockCalls | None = None  # the layers on a CPU; None runs their modules

    def __init__(self, config: DrafterConfig, own: OwnVocabulary | None = None) -> None:
        super().__init__(config)
        self.own = own or OwnVocabulary()
        self.rotary = Rotary(config)
