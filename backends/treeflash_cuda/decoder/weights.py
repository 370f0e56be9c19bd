"""The weights of a decoder, read tensor by tensor from a folder, or packed ones mapped from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from treeflash.drafters.adapter import (
    SHARED_WEIGHT,
    missing_layer,
    read_adapter,
    refuse_module,
)
from treeflash.drafters.folder import FLOATS, StoredTensor, stored_tensors
from treeflash.errors import CheckpointError, first_line
from treeflash.low_bit_formats import MALFORMED, LowBitTensors
from treeflash.low_bits import LowBitWeight, StoredWeight
from treeflash.low_bits import join as join_weights
from treeflash_cuda.decoder.facts import DecoderFacts
from treeflash_cuda.decoder.families import NETWORK, QKV
from treeflash_cuda.decoder.operations import DecoderOperations
from treeflash_cuda.low_bit_linear import LowBitEmbedding, LowBitLinear

OUTPUT_HEAD = "lm_head"
PLACES = "model", "model.language_model"
"""The names of a decoder in a checkpoint, alone and beside what reads images."""
JOINED = {QKV: "qkv_proj", NETWORK[:2]: "gate_up_proj"}
"""Tensors that some checkpoints have in place of some layers', whose rows follow each other."""
DTYPES = dict(
    zip(FLOATS, (torch.bfloat16, torch.float16, torch.float32, torch.float64), strict=True)
)
"""Types of numbers, by their names in files."""
Packed = TypeVar("Packed", bound=LowBitLinear)
Table: TypeAlias = nn.Embedding | LowBitEmbedding


class Checkpoint:
    """The tensors of a folder; each is read when it is asked for.

    Weights of few bits are packed in the folder already, and mapped; or they are `low_bits`, which
    are packed when they are read.
    """

    low_bits: LowBitTensors | None = None  # layers in the format of another library

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Read the headers of the files; raises a CheckpointError if one is damaged."""
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = stored_tensors(folder)
        self._files: dict[Path, Any] = {}  # open files: each is mapped once
        # Modules with packed weights, and the modules that have layers as their parts.
        self.packed = StoredWeight.of(config.get("quantization_config") or {})
        self.wholes = {
            f"{name.removesuffix(own)}{part}": name
            for name, stored in self.packed.items()
            for own in (name.rpartition(".")[2],)
            for part in stored.parts or (own,)
        }
        # The name of the decoder; None if its tensors have other names.
        self.place = next((x for x in PLACES if self._has(f"{x}.embed_tokens")), None)
        self.refusal: str | None = None  # why weights of few bits are not read, as a clause
        if not self.packed:
            shapes = {name: stored.shape for name, stored in self.tensors.items()}
            found = LowBitTensors.find(config, shapes)
            if isinstance(found, str):
                self.refusal = found
            else:
                self.low_bits = found

    def _has(self, layer: str) -> bool:
        return f"{layer}.weight" in self.tensors or layer in self.packed

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored embeddings; float32 for numbers of few bits."""
        stored = self.tensors.get(f"{self.place}.embed_tokens.weight")
        return torch.float32 if stored is None else DTYPES[stored.dtype]

    @property
    def foreign(self) -> str | None:
        """Why the tensors are not ones that are read here, of transformers' names; or None."""
        if self.refusal is not None:
            return self.refusal
        if self.place is None:
            return "its tensors have other names"
        plain = (
            x
            for name, x in self.tensors.items()
            if name.rpartition(".")[0] not in self.packed
            and not (self.low_bits is not None and self.low_bits.owns(name))
        )
        if any(tensor.dtype not in FLOATS for tensor in plain):
            return "its weights are not plain numbers"
        return None

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Map a tensor of the folder into memory.

        Raises a CheckpointError if it is missing, or does not have this shape.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{self.folder} lacks the tensor {name}")
        if stored.shape != shape:
            raise CheckpointError(
                f"{self.folder} cannot be loaded: the tensor {name} has the shape {stored.shape}, "
                f"and its config.json asks for {shape}"
            )
        try:
            if stored.path not in self._files:
                self._files[stored.path] = safe_open(stored.path, framework="pt")
            tensor: Tensor = self._files[stored.path].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{stored.path} is damaged: {error}") from error
        return tensor

    def has_few_bits(self, layer: str) -> bool:
        """Return whether the weight of a layer has few bits."""
        is_low = self.low_bits is not None and layer in self.low_bits.layers
        return is_low or layer in self.wholes

    def modules(self, layers: Mapping[str, bool], dtype: torch.dtype) -> list[LowBitLinear]:
        """Return layers with weights of few bits and the same input, as few modules as can be.

        `layers` says which of them have a bias.
        """
        if self.low_bits is None:
            wholes = dict.fromkeys(self.wholes[layer] for layer in layers)
            return [self.module(whole, LowBitLinear, dtype) for whole in wholes]
        weights = [self.low_bit_weight(layer) for layer in layers]
        biases = [
            self.read(f"{layer}.bias", (len(weight.numbers),)).to(dtype, copy=True) if has else None
            for (layer, has), weight in zip(layers.items(), weights, strict=True)
        ]
        label = self.low_bits.label(next(iter(layers)))
        known = [bias for bias in biases if bias is not None]
        if len(known) in (0, len(layers)) and (whole := join_weights(weights)) is not None:
            return [LowBitLinear.of(whole, label, torch.cat(known) if known else None, dtype)]
        return [
            LowBitLinear.of(weight, label, own, dtype)
            for weight, own in zip(weights, biases, strict=True)
        ]

    def module(self, name: str, kind: type[Packed], dtype: torch.dtype) -> Packed:
        """Return the module with a name, without a bias unless that is packed with its weight."""
        if self.low_bits is not None:
            label = self.low_bits.label(name)
            return kind.of(self.low_bit_weight(name), label, None, dtype)
        stored = self.packed[name]
        with torch.device("meta"):
            module = kind(stored, dtype)
        for tensor, (_, shape) in stored.tensors.items():
            mapped = self.read(f"{name}.{tensor}", shape)
            setattr(module, tensor, nn.Parameter(mapped, requires_grad=False))
        if stored.bias:
            bias = self.read(f"{name}.bias", (stored.shape[0],)).to(dtype, copy=True)
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module

    def low_bit_weight(self, layer: str) -> LowBitWeight:
        """Read a layer's weight in the format of another library.

        Raises a CheckpointError if its tensors do not fit each other.
        """
        assert self.low_bits is not None
        try:
            return self.low_bits.read(layer, self.tensors, self._array)
        except MALFORMED as error:
            raise CheckpointError(
                f"{self.folder} is damaged: the tensors of {layer} do not fit each other "
                f"({first_line(error)})"
            ) from error

    def _array(self, name: str) -> NDArray[Any]:
        """Read a tensor as NumPy's, which has no bfloat16."""
        tensor = self.read(name, self.tensors[name].shape)
        array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return array


class DecoderWeights:
    """The weights of a decoder in a dtype, by the names of transformers' modules."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        operations: DecoderOperations,
        dtype: torch.dtype,
        facts: DecoderFacts,
        *,
        unpack: bool,  # whether packed weights are dequantised
        device: torch.device,  # weights that stay packed are on the CPU
        adapter: str | None,  # the folder of a LoRA adapter, merged into weights
    ) -> None:
        """Take a checkpoint; raises the errors of `read_adapter`."""
        self.checkpoint, self.operations, self.dtype = checkpoint, operations, dtype
        self.facts, self.unpack, self.device = facts, unpack, device
        # The adapter's updates, by layer, and the layers whose weights have been read.
        self.updates = {} if adapter is None else {x.name: x for x in read_adapter(Path(adapter))}
        self._known = set[str]()
        assert checkpoint.place is not None, "see `Checkpoint.foreign`"
        self.place = checkpoint.place

    def norm(self, name: str, size: int) -> Tensor:
        """Return the (size,) float32 weight of the norm with a name."""
        weight = self.checkpoint.read(f"{name}.weight", (size,))
        return weight.to(self.device, torch.float32, copy=True) + self.facts.norm_offset

    def read(self, name: str, *shape: int) -> Tensor:
        """Return a copy of the tensor with a name, so that the file may change later."""
        return self._read(name, shape).to(self.device)

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a tensor on the device, or on the CPU if it had few bits."""
        module, _, own = name.rpartition(".")
        whole = self.checkpoint.wholes.get(module)
        if whole is None and own == "weight" and self.checkpoint.has_few_bits(module):
            values = self.checkpoint.low_bit_weight(module).dequantised()
            self._check([(len(values), values.shape[1])], shape[1], shape[0])
            return torch.from_numpy(values).to(self.dtype)
        if whole is None:
            return self.checkpoint.read(name, shape).to(self.device, self.dtype, copy=True)
        stored = self.checkpoint.packed[whole]
        first, part = 0, module.rpartition(".")[2]
        for other, count in stored.parts.items():
            if other == part:
                break
            first += count
        rows = torch.arange(first, first + shape[0])
        layer = self.checkpoint.module(whole, LowBitLinear, self.dtype)
        if own == "weight":
            return layer.rows(rows)
        assert layer.bias is not None
        return layer.bias[rows]

    def table(self, name: str, rows: int, size: int) -> Table:
        """Return the input table: (..., size) rows of (...) tokens."""
        if self._is_packed(name):
            return self.checkpoint.module(name, LowBitEmbedding, self.dtype)
        return nn.Embedding.from_pretrained(self.read(f"{name}.weight", rows, size))

    def head(
        self, name: str, table: Table | None, rows: int, size: int
    ) -> tuple[nn.Module, Tensor | LowBitLinear]:
        """Return the output head, and the weight that tokens have rows of.

        `table` is the input table if its weight is the head's, as the configuration says. As in
        transformers, a head that is stored beside it counts if its weight is another one.
        """
        if isinstance(table, LowBitEmbedding):
            packed = table.output_head()
            return packed, packed
        if table is None and self._is_packed(name):
            packed = self.checkpoint.module(name, LowBitLinear, self.dtype)
            return packed, packed
        if table is not None and f"{name}.weight" in self.checkpoint.tensors:
            stored = self.read(f"{name}.weight", rows, size)
            table = table if torch.equal(stored, table.weight) else None
        weight = self._matrix(name, rows, size) if table is None else table.weight.data
        return self.operations.linear([weight], [None]), weight

    def linear(self, place: str, size: int, **outputs: int) -> nn.Module:
        """Return the layers with these names and numbers of outputs as one.

        They are beside each other at a place, and read the same `size` numbers.
        """
        names = {f"{place}.{x}": n for x, n in outputs.items()}
        stored = {x: self._stored(x, n) for x, n in outputs.items()}
        has_bias = {f"{place}.{x}": stored[x][0] in self.facts.biases for x in outputs}
        few = [self._is_packed(name) for name in names]
        if any(few) and not all(few):
            return Joined([self.linear(place, size, **{x: n}) for x, n in outputs.items()])
        if all(few):
            parts = self.checkpoint.modules(has_bias, self.dtype)
            self._check([part.shape for part in parts], size, sum(outputs.values()))
            return parts[0] if len(parts) == 1 else Joined(parts)
        weights = [
            self._ordered(x, weight)
            for x, weight in zip(outputs, self._matrices(place, size, outputs), strict=True)
        ]
        biases = [
            self._ordered(x, self.read(f"{place}.{own}.bias", n)) if has_bias[name] else None
            for name, (x, (own, n)) in zip(names, stored.items(), strict=True)
        ]
        return self.operations.linear(weights, biases)

    def stacked(self, places: Sequence[str], size: int, **outputs: int) -> Tensor:
        """Return the (places, outputs, size) weights of such layers at several places."""
        parts, device = list(outputs.values()), self.device
        whole = torch.empty(len(places), sum(parts), size, dtype=self.dtype, device=device)
        for place, rows in zip(places, whole, strict=True):
            for own, weight in zip(
                rows.split(parts), self._matrices(place, size, outputs), strict=True
            ):
                own.copy_(weight)
        return whole

    def _stored(self, layer: str, rows: int) -> tuple[str, int]:
        """Return the layer that has a layer's rows in the checkpoint, and its number of rows."""
        stored = self.facts.stored_rows.get(layer)
        return (layer, rows) if stored is None else (stored.name, stored.count)

    def _matrices(self, place: str, size: int, outputs: Mapping[str, int]) -> Sequence[Tensor]:
        """Read the weights of layers, which may be parts of one tensor."""
        if (stacked := self._of_experts(place, size, outputs)) is not None:
            return stacked
        joined = f"{place}.{JOINED.get(tuple(outputs))}"
        if f"{joined}.weight" in self.checkpoint.tensors:
            return self._matrix(joined, sum(outputs.values()), size).split(list(outputs.values()))
        stored = [self._stored(x, n) for x, n in outputs.items()]
        return [self._matrix(f"{place}.{x}", n, size) for x, n in stored]

    def _of_experts(
        self, place: str, size: int, outputs: Mapping[str, int]
    ) -> Sequence[Tensor] | None:
        """Read the weights of an expert from one tensor of all; None if there is no such tensor."""
        whole, _, number = place.rpartition(".")
        name = f"{whole}.{JOINED.get(tuple(outputs)) or next(iter(outputs))}"
        if self.facts.experts is None or name not in self.checkpoint.tensors:
            return None
        rows = list(outputs.values())
        stored = self.checkpoint.read(name, (self.facts.experts.count, sum(rows), size))
        return stored[int(number)].to(self.device, self.dtype, copy=True).split(rows)

    def _matrix(self, layer: str, rows: int, size: int) -> Tensor:
        """Read the weight of a linear layer, and add its update in float32."""
        weight, update = self.read(f"{layer}.weight", rows, size), self.updates.get(layer)
        self._known.add(layer)
        if update is None:
            return weight
        if update.shape != (rows, size):
            raise refuse_module(layer, missing_layer(update))
        return (weight.float() + torch.from_numpy(update.delta()).to(self.device)).to(self.dtype)

    def refuse_other_updates(self) -> None:
        """Raise an UnsupportedModelError if the adapter has updates of what is no linear layer."""
        for name, update in self.updates.items():
            if name in self._known:
                continue
            is_tied = name == OUTPUT_HEAD and self.facts.ties_head
            raise refuse_module(name, SHARED_WEIGHT if is_tied else missing_layer(update))

    def _ordered(self, layer: str, rows: Tensor) -> Tensor:
        """Return the rows of a layer's weight or bias, from the rows of the layer that has them."""
        stored = self.facts.stored_rows.get(layer)
        return rows if stored is None else rows.index_select(0, stored.index)

    def _is_packed(self, name: str) -> bool:
        """Return whether a weight keeps its few bits."""
        return not self.unpack and self.checkpoint.has_few_bits(name)

    def _check(self, found: list[tuple[int, int]], size: int, rows: int) -> None:
        """Raise a CheckpointError if packed layers have other shapes than the configuration."""
        if sum(out for out, _ in found) != rows or any(width != size for _, width in found):
            raise CheckpointError(
                f"{self.checkpoint.folder} cannot be loaded: layers have the shapes {found}, and "
                f"its config.json asks for {rows} x {size}"
            )


class Joined(nn.Module):
    """Layers that read the same input, one after the other."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to the outputs of all layers beside each other."""
        return torch.cat([part(x) for part in self.parts], -1)
