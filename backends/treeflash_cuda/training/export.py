"""A trained drafter as a checkpoint folder in the published format, with its model card."""

from __future__ import annotations

import json
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from treeflash.training.model_card import model_card
from treeflash_cuda.training.run import Run, write_whole


def export(accelerator: Accelerator, blocks: nn.Module, settings: dict[str, Any], run: Run) -> None:
    """Write `config.json`, `model.safetensors` (bfloat16) and `README.md` into a run's folder."""
    state = accelerator.get_state_dict(blocks)
    if not accelerator.is_main_process:
        return
    tensors = {
        name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()
    }
    scratch = run.folder / "model.safetensors.tmp"
    save_file(tensors, scratch, metadata={"format": "pt"})
    scratch.rename(run.folder / "model.safetensors")
    write_whole(run.folder / "config.json", json.dumps(settings, indent=2) + "\n")
    write_whole(run.folder / "README.md", model_card(settings, run.identity, run.records))
