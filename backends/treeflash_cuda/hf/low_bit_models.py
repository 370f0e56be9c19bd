"""Models of transformers with weights of few bits.

transformers builds the model without memory, a quantiser puts layers for packed weights in place of
its own, and transformers then maps their tensors from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from treeflash.low_bits import METHOD, StoredWeight
from treeflash_cuda.decoder.weights import Checkpoint
from treeflash_cuda.low_bit_linear import LowBitEmbedding, LowBitLinear


@register_quantization_config(METHOD)
class LowBitConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """The `quantization_config` of a folder with packed weights.

    With `dequantise`, a setting of a load, layers get weights in the dtype of the load. With a
    `folder`, the layers of another library's format are read from it.
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        dequantise: bool = False,
        folder: str | None = None,
        stored: Mapping[str, Any] | None = None,  # what the folder's configuration says
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.modules, self.dequantise = modules, dequantise
        self.folder, self.stored = folder, stored

    @classmethod
    def of_folder(cls, folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the settings with which layers of a folder keep the bits that they have."""
        settings = {"folder": str(folder), "stored": config.to_dict()}
        return {"quant_method": METHOD, "modules": {}} | settings

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The folder of another library's format."""
        return None if self.folder is None else Checkpoint(Path(self.folder), self.stored or {})


class _Awaited(nn.Module):
    """Stands in the place of a layer that is read when transformers has read all others."""

    def __init__(self, has_bias: bool) -> None:
        super().__init__()
        self.has_bias = has_bias


@register_quantizer(METHOD)
class LowBitQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Gives a model the layers of a `LowBitConfig`."""

    quantization_config: LowBitConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        dtype = model.dtype  # dtype of its first tensor, which will be scales
        if (checkpoint := self.quantization_config.checkpoint) is not None:
            assert checkpoint.low_bits is not None
            for name in checkpoint.low_bits.layers:  # transformers knows none of their tensors
                parent, own = _place(model, name)
                setattr(parent, own, _Awaited(getattr(parent, own).bias is not None))
        for name, stored in StoredWeight.of(vars(self.quantization_config)).items():
            parent, own = _place(model, name)
            if getattr(parent, own, None) is model.get_input_embeddings():
                model.set_input_embeddings(LowBitEmbedding(stored, dtype))
                if model.config.get_text_config().tie_word_embeddings:
                    # It has no tensors in the file, and gets the table's when they are loaded.
                    model.set_output_embeddings(nn.Identity())
                    model.all_tied_weights_keys = {}
                continue
            setattr(parent, own, LowBitLinear(stored, dtype))
            for part in stored.parts:
                setattr(parent, part, nn.Identity())  # until the tensors are loaded

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        table = model.get_input_embeddings()
        if isinstance(model.get_output_embeddings(), nn.Identity):
            model.set_output_embeddings(table.output_head())
        split_joined(model)
        if self.quantization_config.dequantise:
            dequantise(model)
        if (checkpoint := self.quantization_config.checkpoint) is not None:
            awaited = {x: y for x, y in model.named_modules() if isinstance(y, _Awaited)}
            for name, module in awaited.items():
                parent, own = _place(model, name)
                (layer,) = checkpoint.modules({name: module.has_bias}, model.dtype)
                setattr(parent, own, layer)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def split_joined(model: nn.Module) -> None:
    """Give a model each layer that a file has joined with others, where its code calls it."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LowBitLinear) and layer.stored.parts:
            parent, own = _place(model, name)
            delattr(parent, own)
            for part, rows in layer.split().items():
                setattr(parent, part, rows)


@torch.no_grad()
def dequantise(model: PreTrainedModel) -> None:
    """Give a model's layers with weights of few bits their weights in its dtype."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, LowBitLinear):
            continue
        parent, own = _place(model, name)
        every = torch.arange(layer.shape[0], device=layer.numbers.device)
        weight, bias = layer.rows(every), layer.bias
        if layer is table:
            setattr(parent, own, nn.Embedding.from_pretrained(weight))
        elif layer is head and layer.numbers is getattr(table, "numbers", None):
            head = _linear(model.get_input_embeddings().weight, bias)
            model.set_output_embeddings(head)
        else:
            setattr(parent, own, _linear(weight, bias))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a layer with these tensors, for inference."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
    layer.load_state_dict(tensors, assign=True)
    return layer.requires_grad_(False)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the parent of a module with a name, and its name there."""
    parent, _, own = name.rpartition(".")
    return model.get_submodule(parent), own
