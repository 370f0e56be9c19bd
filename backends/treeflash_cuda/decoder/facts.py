"""The facts by which decoders differ, read from a target's configuration.

All families of `FAMILIES` have the layers of `model`: attention or a gated delta net, and a gated
network, with norms around them, rotary embeddings, and keys that groups of heads share. What else a
configuration of transformers may say is no fact here, and `decoder_facts` says so: such a target
runs as a model of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from treeflash.low_bit_formats import find_format
from treeflash_cuda.decoder.families import (
    ATTENTION_GATE,
    DELTA_NET,
    FAMILIES,
    QKV,
    DeltaNets,
    Experts,
    Factors,
    Norms,
)
from treeflash_cuda.operations import GATES


@dataclass(frozen=True, eq=False)
class Rope:
    """A kind of rotary embeddings."""

    # (head_dim / 2,) float32 angles between neighbouring positions, 0 for what is not rotated.
    frequencies: Tensor
    scale: Tensor | float  # (head_dim / 2,) factors on cosines and sines, or one

    def to(self, device: torch.device) -> Rope:
        scale = self.scale.to(device) if isinstance(self.scale, Tensor) else self.scale
        return Rope(self.frequencies.to(device), scale)


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Where a checkpoint has the rows of a linear layer."""

    name: str  # the linear layer that has them there
    count: int  # its rows
    index: Tensor  # (rows,) their places

    def to(self, device: torch.device) -> StoredRows:
        return replace(self, index=self.index.to(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderFacts:
    """What a decoder is made of."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str  # the name of the gate's activation, see `GATES`
    eps: float  # the norms' epsilon
    ties_head: bool  # whether the output head's weight is the table of embeddings
    biases: frozenset[str]  # the linear layers of a layer that have a bias
    norms: Norms
    norm_offset: float  # see `DecoderFamily`
    norms_heads: str | None  # see `DecoderFamily`
    factors: Factors
    windows: tuple[int | None, ...]  # positions that a layer sees, by layer; None for all
    ropes: tuple[Rope, ...]
    rotated: tuple[int | None, ...]  # the index of a layer's rope, by layer; None without one
    # (head_dim,) places of a query's and a key's numbers in the checkpoint: layers rotate numbers
    # half a head away from each other. None if they have the checkpoint's order.
    head_order: Tensor | None
    # Linear layers, by name, whose rows have another order or another name in the checkpoint.
    stored_rows: Mapping[str, StoredRows]
    experts: Experts | None
    gates_attention: bool  # whether attention has a gate for each of its numbers
    delta_nets: DeltaNets | None

    def to(self, device: torch.device) -> DecoderFacts:
        """Return the facts with their tensors on a device."""
        order = self.head_order
        return replace(
            self,
            ropes=tuple(rope.to(device) for rope in self.ropes),
            head_order=None if order is None else order.to(device),
            stored_rows={name: rows.to(device) for name, rows in self.stored_rows.items()},
        )

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that have keys and values."""
        nets = frozenset[int]() if self.delta_nets is None else self.delta_nets.layers
        return tuple(n for n in range(self.layers) if n not in nets)

    @property
    def inner_sizes(self) -> tuple[int, ...]:
        """The numbers between the products of the layers' networks."""
        experts = self.experts
        if experts is None:
            return (self.intermediate_size,)
        dense = (self.intermediate_size,) if len(experts.layers) < self.layers else ()
        shared = () if experts.shared_size is None else (experts.shared_size,)
        return (experts.size, *shared, *dense)

    @property
    def score_scale(self) -> float:
        """Factor on the products of queries and keys."""
        scale = self.factors.scores
        return self.head_dim**-0.5 if scale is None else scale

    @property
    def is_capped(self) -> bool:
        return self.factors.score_cap is not None or self.factors.logit_cap is not None


def decoder_facts(config: Any) -> DecoderFacts | str:
    """Read the facts of transformers' configuration; or why a target has others, as a clause."""
    family, stored = FAMILIES.get(config.model_type), find_format(config.to_dict())
    if family is None:
        return f"treeflash has no layers of its own for {config.model_type} models"
    config = config.get_text_config()  # of a model that also reads images
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads < 1 or kv_heads < 1:
        return "it has no heads"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = config.num_hidden_layers
    kinds = _rope_kinds(config)
    windows = _windows(config, family.windows)
    parts = {rope.get("partial_rotary_factor", 1) for rope in kinds.values()}
    turned = int(head_dim * max(parts)) if family.rotates_parts else head_dim
    has_order = turned != head_dim or family.rotates_pairs
    names_of_gates = (getattr(config, x, None) for x in ("hidden_activation", "hidden_act"))
    activation = str(next(filter(None, names_of_gates), None))
    experts, nets = family.experts(config), family.delta_nets(config)
    rotates = [True] * layers if family.rotated is None else getattr(config, family.rotated)
    names: Sequence[str] = ["every"] * layers if "every" in kinds else config.layer_types
    reasons = {
        f"its activation is {activation}": activation not in GATES,
        "heads cannot share its keys evenly": heads % kv_heads or head_dim % 2,
        "its rotary embeddings depend on a text's length": any(
            rope.get("rope_type") not in family.rope_types for rope in kinds.values()
        ),
        "its heads are rotated in part": (parts != {1} and not family.rotates_parts)
        or not 0 < turned <= head_dim
        or turned % 2,
        "its queries and keys are clipped": getattr(config, "clip_qkv", None),
        "its windows have no size": windows is None,
        "a list has no entry for each of its layers": min(len(rotates), len(names)) < layers
        or not kinds.keys() >= set(names[:layers]),
        "none of its layers has keys": nets is not None and len(nets.layers) == layers,
        "heads cannot share its states evenly": nets is not None and nets.heads % nets.key_heads,
        "its tokens see later ones": getattr(config, "use_bidirectional_attention", None),
        str(stored): isinstance(stored, str),
        "few bits of joined layers and of experts are not read": stored is not None
        and (family.rotates_parts or experts is not None),
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        return reason
    assert windows is not None
    order = _head_order(head_dim, turned, family.rotates_pairs) if has_order else None
    optional = (names for name, names in family.optional_biases.items() if getattr(config, name))
    names_of_ropes = list(kinds)
    return DecoderFacts(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", 0),  # none if all have experts
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        activation=activation,
        eps=config.rms_norm_eps,
        ties_head=bool(config.tie_word_embeddings),
        biases=frozenset(family.biases).union(*optional),
        norms=family.norms,
        norm_offset=family.norm_offset,
        norms_heads=family.norms_heads,
        factors=family.factors(config),
        windows=windows,
        ropes=tuple(_rope(config, name, rope, head_dim, turned) for name, rope in kinds.items()),
        rotated=tuple(
            names_of_ropes.index(name) if rotate else None
            for name, rotate in zip(names[:layers], rotates, strict=False)
        ),
        head_order=order,
        stored_rows=_stored_rows(heads, kv_heads, head_dim, order, gates=family.gates_attention)
        | ({} if nets is None else _rows_of_nets(nets)),
        experts=experts,
        gates_attention=family.gates_attention,
        delta_nets=nets,
    )


def _windows(config: Any, rule: str | None) -> tuple[int | None, ...] | None:
    """Return the windows by layer; None if a layer lacks one that its type asks for."""
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    if rule is None:
        return (None,) * layers
    if rule == "all":
        return (window,) * layers
    slides: list[bool] = [kind == "sliding_attention" for kind in config.layer_types[:layers]]
    if len(slides) < layers or (any(slides) and not window):
        return None
    return tuple(window if x else None for x in slides)


def _rope_kinds(config: Any) -> dict[str, Mapping[str, Any]]:
    """Return the settings of rotary embeddings, by the type of layers that have them."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope and all(isinstance(part, Mapping) for part in rope.values()):
        return {name: part for name, part in rope.items() if name in config.layer_types}
    return {"every": rope}


def _rope(config: Any, kind: str, rope: Mapping[str, Any], head_dim: int, turned: int) -> Rope:
    """Compute the frequencies and the scale as transformers does, to the last bit."""
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, turned, 2, dtype=torch.float) / turned
        frequencies, scale = 1.0 / rope["rope_theta"] ** exponents, 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # takes a second

        layer_type = None if kind == "every" else kind
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, layer_type=layer_type)
    if turned == head_dim:
        return Rope(frequencies, scale)
    rest = torch.zeros((head_dim - turned) // 2)
    scales = torch.cat([torch.full((turned // 2,), scale), rest + 1])
    return Rope(torch.cat([frequencies, rest]), scales)


def _head_order(head_dim: int, turned: int, pairs: bool) -> Tensor:
    """Return `DecoderFacts.head_order` for heads whose first numbers are rotated."""
    own, rest = torch.arange(head_dim).split([turned, head_dim - turned])
    halves = (own[::2], own[1::2]) if pairs else own.tensor_split(2)
    return torch.cat([x for two in zip(halves, rest.tensor_split(2), strict=True) for x in two])


def _stored_rows(
    heads: int, kv_heads: int, head_dim: int, order: Tensor | None, *, gates: bool
) -> dict[str, StoredRows]:
    """Return `DecoderFacts.stored_rows` of attention; a head's gates follow its queries."""
    if order is None and not gates:
        return {}
    own = torch.arange(head_dim) if order is None else order
    found, width = {}, head_dim * (1 + gates)
    for name, count, step in zip(QKV[:2], (heads, kv_heads), (width, head_dim), strict=True):
        places = step * torch.arange(count)[:, None] + own
        found[name] = StoredRows(name, step * count, places.flatten())
    if gates:
        places = width * torch.arange(heads)[:, None] + head_dim + torch.arange(head_dim)
        found[ATTENTION_GATE] = StoredRows(QKV[0], width * heads, places.flatten())
    return found


def _rows_of_nets(nets: DeltaNets) -> dict[str, StoredRows]:
    """Return `DecoderFacts.stored_rows` of gated delta nets whose heads are joined."""
    if not nets.joins_heads:
        return {}
    qkv, z, b, a = DELTA_NET
    shared = nets.heads // nets.key_heads
    values = shared * nets.value_dim
    qkvz, ba = (
        torch.arange(nets.key_heads * width).view(nets.key_heads, width)
        for width in (2 * (nets.key_dim + values), 2 * shared)
    )
    *parts, gates = qkvz.split([nets.key_dim, nets.key_dim, values, values], 1)
    rows = {
        qkv: torch.cat([part.flatten() for part in parts]),
        z: gates.flatten(),
        b: ba[:, :shared].flatten(),
        a: ba[:, shared:].flatten(),
    }
    joined = dict.fromkeys((qkv, z), ("in_proj_qkvz", qkvz.numel()))
    joined |= dict.fromkeys((b, a), ("in_proj_ba", ba.numel()))
    return {name: StoredRows(*joined[name], index) for name, index in rows.items()}
