"""A model whose layers are on several devices, as accelerate places them (`--device-map auto`).

Each module takes its inputs to its own device. The model's inputs and outputs are on the device of
its embeddings, where drafts and choices are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from treeflash.errors import ConfigError
from treeflash_cuda.arena import Span
from treeflash_cuda.attention import MASK, is_attending


def spans_of(layers: Sequence[nn.Module]) -> list[Span]:
    """Devices, and how many layers in a row each one has.

    Raises:
        ConfigError: a layer is not on a GPU.
    """
    devices = [next(layer.parameters()).device for layer in layers]
    if any(device.type in ("cpu", "meta") for device in devices):
        raise ConfigError(
            "the target does not fit into the GPUs: --device-map places no layer elsewhere; choose "
            "a quantised target"
        )
    return [(device, len(list(group))) for device, group in groupby(devices)]


def follow_devices(model: Any, layers: Sequence[nn.Module], home: torch.device) -> None:
    """Let every part of a model take its inputs to its device, and the last ones results home.

    Args:
        model: of transformers; accelerate's hooks are removed.
        layers: of its decoder.
        home: the device of the embeddings.
    """
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    ends = [x for x in decoder.children() if x not in (*layers, model.get_input_embeddings())]
    ends = [x for x in [*ends, head] if next(x.parameters(), None) is not None]
    for module in (*layers, *ends):
        device = next(module.parameters()).device
        module.register_forward_pre_hook(_taking_inputs(device), with_kwargs=True)
    for module in ends:
        module.register_forward_hook(lambda _, __, output: output.to(home))


def _taking_inputs(device: torch.device) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        # Contexts know masks by their identity, and move them themselves.
        kept = {MASK: kwargs[MASK]} if is_attending() and MASK in kwargs else {}
        return _moved(args, device), _moved(kwargs, device) | kept

    return hook


def _moved(x: Any, device: torch.device) -> Any:
    """Tensors, and those in tuples and dictionaries, on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if type(x) in (tuple, list):
        return type(x)(_moved(part, device) for part in x)
    if type(x) is dict:
        return {name: _moved(part, device) for name, part in x.items()}
    return x
