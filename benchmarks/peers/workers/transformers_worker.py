"""transformers: `generate`, its own ways to draft, and the loop of `treeflash.transformers`."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from serve import answer, describe, serve
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MuseGlimmerAssistantConfig,
    MuseGlimmerAssistantModel,
)
from transformers.generation.streamers import BaseStreamer

from treeflash.transformers import generate

LOOKUP_TOKENS = 10  # number in the documentation of transformers


class Clock(BaseStreamer):
    """Records the time of the first token, and counts the target's forward passes."""

    def __init__(self, target: Any) -> None:
        self.forwards = 0
        self.prefilled = 0.0
        target.register_forward_hook(self._count)

    def start(self) -> None:
        """Begin a text."""
        self.forwards, self.prefilled = 0, 0.0

    def put(self, value: Tensor) -> None:
        """Record the time of new tokens; the prompt may come before the first forward pass."""
        if self.forwards and not self.prefilled:
            self.prefilled = time.perf_counter()

    def end(self) -> None:
        """Do nothing: transformers calls it after the last tokens."""

    def _count(self, *_: Any) -> None:
        self.forwards += 1


def load_dflash(folder: Path, dtype: torch.dtype) -> Any:
    """Load a DFlash drafter as the assistant that transformers has for its own DFlash.

    transformers 5.24 has one class for it, which has the layers of every DFlash drafter.
    """
    settings = json.loads((folder / "config.json").read_text())
    settings |= settings.pop("dflash_config") | {"model_type": "muse_glimmer_assistant"}
    settings = {name: value for name, value in settings.items() if value is not None}
    model = MuseGlimmerAssistantModel(MuseGlimmerAssistantConfig(**settings))
    names = {
        "fc.weight": "encoder.fc.weight",
        "hidden_norm.weight": "encoder.output_norm_enc.weight",
    }
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({names.get(name, name): tensor for name, tensor in tensors.items()})
    return model.to(dtype).eval()


def load(setup: dict[str, Any]) -> tuple[dict, Any]:
    """Load the target and the drafter, if given."""
    device = setup["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "auto" if setup["dtype"] == "auto" else getattr(torch, setup["dtype"])
    model: Any = AutoModelForCausalLM.from_pretrained(setup["target"], dtype=dtype)
    # A checkpoint's own settings may sample or penalise repetition.
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=setup["stop_token_ids"] or None,
        pad_token_id=0,  # unused, but transformers requires one
    )
    model = model.to(device).eval()
    clock = Clock(model)
    options: dict[str, dict[str, Any]] = {
        "generate": {},
        "prompt-lookup": {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
    }
    skipped = {}
    if setup["drafter"]:
        dflash = load_dflash(Path(setup["dflash_drafter"]), model.dtype).to(model.device)
        loop = partial(generate, streamer=clock)
        options["dflash"] = {"assistant_model": dflash, "speculation_type": "dflash"}
        options["treeflash"] = {"custom_generate": loop, "drafter": setup["drafter"]}
    else:
        skipped = dict.fromkeys(("dflash", "treeflash"), "needs a drafter: --drafter FOLDER_OR_ID")

    def decode(prompt_ids: list[int], method: str, budget: object, max_tokens: int) -> dict:
        prompt = torch.tensor([prompt_ids], device=model.device)
        clock.start()
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_tokens,
            streamer=clock,
            **options[method],
        )
        token_ids = output[0, len(prompt_ids) :].tolist()
        seconds = time.perf_counter() - clock.prefilled
        return answer(token_ids, len(token_ids) - 1, clock.forwards - 1, seconds)

    packages = ("transformers", "torch")
    return describe(list(options), model.device, model.dtype, packages, skipped), decode


if __name__ == "__main__":
    serve(load)
