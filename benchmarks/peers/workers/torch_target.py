"""Load a target for the PyTorch workers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig


def choose_device(name: str | None) -> torch.device:
    """Return the device with that name; None is CUDA if available, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_model(folder: str, setup: dict[str, Any]) -> Any:
    """Load a causal language model on the setup's device, in its dtype."""
    dtype = getattr(torch, setup["dtype"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # A checkpoint's own settings may sample or penalise repetition.
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=setup["stop_token_ids"] or None,
        pad_token_id=0,  # unused, but transformers requires one
    )
    return model.to(choose_device(setup["device"])).eval()
