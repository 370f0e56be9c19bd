"""The weights of a checkpoint in transformers' names, read tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from treeflash.drafters.folder import FLOATS, StoredTensor, stored_tensors
from treeflash.errors import CheckpointError

EMBEDDINGS = "model.embed_tokens.weight"


class Checkpoint:
    """The tensors of a folder, of which each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of the files; raises a CheckpointError if one is damaged."""
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = stored_tensors(folder)

    @property
    def foreign(self) -> str | None:
        """Why the tensors are not plain ones under transformers' names, as a clause; or None."""
        if EMBEDDINGS not in self.tensors:
            return "its tensors have other names"
        if any(tensor.dtype not in FLOATS for tensor in self.tensors.values()):
            return "its weights are not plain numbers"
        return None

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Read a tensor.

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
                # A copy, so that the file may change later.
                return file.get_tensor(name).to(dtype, copy=True)
        except SafetensorError as error:
            raise CheckpointError(f"{stored.path} is damaged: {error}") from error
