"""The weights of a decoder, read tensor by tensor from a folder, or packed ones mapped from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from treeflash.drafters.folder import FLOATS, StoredTensor, stored_tensors
from treeflash.errors import CheckpointError
from treeflash.low_bits import StoredWeight
from treeflash_cuda.cpu.decoder import Table
from treeflash_cuda.cpu.decoder_operations import DecoderOperations
from treeflash_cuda.cpu.low_bit_linear import LowBitEmbedding, LowBitLinear

EMBEDDINGS = "model.embed_tokens"
Packed = TypeVar("Packed", bound=LowBitLinear)


class Checkpoint:
    """The tensors of a folder, of which each is read when it is asked for."""

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        """Read the headers of the files; raises a CheckpointError if one is damaged.

        `settings` are the folder's `quantization_config`.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = stored_tensors(folder)
        # Modules with packed weights, and the modules that have layers as their parts.
        self.packed = StoredWeight.of(settings or {})
        self.wholes = {
            f"{name.rpartition('.')[0]}.{part}": name
            for name, stored in self.packed.items()
            for part in stored.parts or (name.rpartition(".")[2],)
        }

    @property
    def foreign(self) -> str | None:
        """Why the tensors are not plain or packed ones of transformers' names; or None."""
        if f"{EMBEDDINGS}.weight" not in self.tensors and EMBEDDINGS not in self.packed:
            return "its tensors have other names"
        plain = (
            x for name, x in self.tensors.items() if name.rpartition(".")[0] not in self.packed
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
            with safe_open(stored.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{stored.path} is damaged: {error}") from error
        return tensor

    def module(self, name: str, kind: type[Packed], dtype: torch.dtype) -> Packed:
        """Map the module with a name, whose weights are packed."""
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


class DecoderWeights:
    """`Weights` of a checkpoint in a dtype."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        operations: DecoderOperations,
        dtype: torch.dtype,
        biases: frozenset[str],  # the linear layers of a layer that have a bias
        *,
        unpack: bool,  # whether packed weights are dequantised
    ) -> None:
        self.checkpoint, self.operations, self.dtype = checkpoint, operations, dtype
        self.biases, self.unpack = biases, unpack

    def read(self, name: str, *shape: int) -> Tensor:
        """Return a copy of the tensor with a name, so that the file may change later."""
        module, _, own = name.rpartition(".")
        whole = self.checkpoint.wholes.get(module)
        if whole is None:
            return self.checkpoint.read(name, shape).to(self.dtype, copy=True)
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

        `table` is the input table if its weight is the head's.
        """
        if isinstance(table, LowBitEmbedding):
            packed = table.output_head()
            return packed, packed
        if table is None and self._is_packed(name):
            packed = self.checkpoint.module(name, LowBitLinear, self.dtype)
            return packed, packed
        weight = self.read(f"{name}.weight", rows, size) if table is None else table.weight.data
        return self.operations.linear([weight], [None]), weight

    def linear(self, place: str, size: int, **outputs: int) -> nn.Module:
        """Return the layers at a place with these names and numbers of outputs as one."""
        names = {f"{place}.{x}": n for x, n in outputs.items()}
        wholes = list(dict.fromkeys(self.checkpoint.wholes.get(name) for name in names))
        if all(whole is not None and not self.unpack for whole in wholes):
            parts = [self.checkpoint.module(str(x), LowBitLinear, self.dtype) for x in wholes]
            self._check(parts, size, sum(outputs.values()))
            return parts[0] if len(parts) == 1 else Joined(parts)
        if len(wholes) > 1 and not self.unpack:  # formats that are packed, and others
            return Joined([self.linear(place, size, **{x: n}) for x, n in outputs.items()])
        weights = [self.read(f"{name}.weight", n, size) for name, n in names.items()]
        biases = [
            self.read(f"{name}.bias", n) if x in self.biases else None
            for x, (name, n) in zip(outputs, names.items(), strict=True)
        ]
        return self.operations.linear(weights, biases)

    def _is_packed(self, name: str) -> bool:
        return not self.unpack and name in self.checkpoint.packed

    def _check(self, parts: list[LowBitLinear], size: int, rows: int) -> None:
        """Raise a CheckpointError if packed layers have other sizes than the configuration."""
        found = [part.shape for part in parts]
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
