"""A trained drafter as a checkpoint folder in the published format, with its model card."""

from __future__ import annotations

import json
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from treeflash.training.model_card import model_card
from treeflash_cuda.training.files import replacing
from treeflash_cuda.training.run import Run


def export(accelerator: Accelerator, blocks: nn.Module, settings: dict[str, Any], run: Run) -> None:
    """Write `config.json`, `model.safetensors` (bfloat16) and `README.md` into a run's folder.

    Raises:
        ConfigError: a file cannot be written.
    """
    state = accelerator.get_state_dict(blocks)
    if not accelerator.is_main_process:
        return
    tensors = {
        name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()
    }
    with replacing(run.folder / "model.safetensors") as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})
    with replacing(run.folder / "config.json") as scratch:
        scratch.write_text(json.dumps(settings, indent=2) + "\n")
    with replacing(run.folder / "README.md") as scratch:
        scratch.write_text(model_card(settings, run.identity, run.records))
