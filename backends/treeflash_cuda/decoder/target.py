"""A target whose layers are our own; see `model`.

`cpu.decoder_target` and `gpu.decoder_target` run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from treeflash.config import LoadConfig
from treeflash.decoding.probe import INEXACT
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.cache import check_quantisation
from treeflash_cuda.decoder.facts import DecoderFacts
from treeflash_cuda.decoder.model import Decoder
from treeflash_cuda.decoder.operations import DecoderOperations
from treeflash_cuda.decoder.weights import Checkpoint, DecoderWeights
from treeflash_cuda.low_bit_linear import LowBitEmbedding
from treeflash_cuda.recurrent_states import MATRIX, TAIL, Key, RecurrentStates
from treeflash_cuda.target import Target


def read_decoder(
    checkpoint: Checkpoint,
    facts: DecoderFacts,
    operations: DecoderOperations,
    dtype: torch.dtype,
    settings: LoadConfig,
    device: torch.device,
    *,
    unpack: bool,  # see `DecoderWeights`
) -> Decoder:
    """Read a decoder's weights, and merge the settings' adapter into them.

    Raises a CheckpointError if files are damaged or do not fit, and an UnsupportedModelError if the
    adapter has more than updates of the decoder's linear layers.
    """
    weights = DecoderWeights(
        *(checkpoint, operations, dtype, facts),
        unpack=unpack,
        device=device,
        adapter=settings.adapter,
    )
    decoder = Decoder(weights).eval()
    weights.refuse_other_updates()
    return decoder


class DecoderTarget(Target):
    """A decoder, and what others read of it; a device's own class has its passes."""

    model: Decoder

    def __init__(
        self,
        config: Any,  # transformers' configuration, or a `PlainConfig`
        decoder: Decoder,
        dtype: torch.dtype,
        device: torch.device,
        *,
        stored: torch.dtype,  # the dtype of keys and values, where `kv_bits` is None
        kv_bits: int | None,  # bits of stored keys and values; None does not quantise them
    ) -> None:
        """Take a decoder with weights on the device.

        Raises a ConfigError if its keys and values cannot be stored in `kv_bits` bits.
        """
        super().__init__(config.get_text_config(), device, list(decoder.layers))
        facts = decoder.facts
        self.model, self.dtype = decoder, dtype
        self.softcap = facts.factors.score_cap
        self.is_hybrid = facts.delta_nets is not None
        self.states_nbytes = sum(x.nbytes for x in self.first_states().values())
        self.arena.layers = len(facts.attention_layers)
        if facts.head_order is not None:
            self.arena.key_order = facts.head_order.cpu().numpy()
        table = decoder.embeddings
        self.embeddings = table if isinstance(table, LowBitEmbedding) else table.weight.data
        self.lm_head, self.lm_head_weight = decoder.lm_head, decoder.head_weight
        shape = 1, facts.kv_heads, 0, facts.head_dim
        if kv_bits is not None:
            check_quantisation(facts.head_dim, config.model_type)
            self.arena.dtype = dtype
        self.arena.set_shape(self.arena.encode(torch.empty(shape, dtype=stored, device=device)))

    def first_states(self) -> dict[Key, Tensor]:
        """Return the recurrent states of an empty sequence; layers share their tensors."""
        nets = self.facts.delta_nets
        if nets is None:
            return {}
        shape = 1, nets.channels, nets.kernel - 1
        tail = torch.zeros(shape, dtype=self.dtype, device=self.device)
        matrix = torch.zeros(1, nets.heads, nets.key_dim, nets.value_dim, device=self.device)
        pairs = (((TAIL, n, 0), (MATRIX, n, 0)) for n in sorted(nets.layers))
        return {key: x for keys in pairs for key, x in zip(keys, (tail, matrix), strict=True)}

    def refuse_recurrent(self) -> None:
        """Raise an UnsupportedModelError if the bits of a row may depend on others in a pass."""
        if self.is_hybrid:
            raise UnsupportedModelError(f"{INEXACT}: it does not support recurrent layers")

    def new_recurrent_states(self) -> RecurrentStates | None:
        return RecurrentStates(frozenset()) if self.is_hybrid else None

    @property
    def facts(self) -> DecoderFacts:
        return self.model.facts

    def capture(self, layer_ids: Sequence[int]) -> None:
        self.captured = tuple(layer_ids)
