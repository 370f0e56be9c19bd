"""A target as the PyTorch workers load it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None is CUDA where there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_model(folder: str, setup: dict[str, Any]) -> Any:
    """A causal language model, on the setup's device and in its type."""
    dtype = getattr(torch, setup["dtype"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # A checkpoint's own settings may sample, or punish repetition.
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=setup["stop_token_ids"] or None,
        pad_token_id=0,  # of longer batches; transformers wants one
    )
    return model.to(choose_device(setup["device"])).eval()
