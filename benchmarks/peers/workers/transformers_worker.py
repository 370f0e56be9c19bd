"""transformers: `generate`, its own DFlash, and the loop of `treeflash.transformers`.

`generate` pads prompts that it gets at once; drafts are for one prompt.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from serve import Answers, describe, serve
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MuseGlimmerAssistantConfig,
    MuseGlimmerAssistantModel,
)
from transformers.generation.streamers import BaseStreamer

from treeflash.drafters.backbone import rope_parameters
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.drafters.formats import canonical_name
from treeflash.transformers import generate


class Clock(BaseStreamer):
    """Tells the answers when their first tokens arrive, and counts the target's forward passes."""

    def __init__(self, target: Any) -> None:
        target.register_forward_hook(self._count)

    def start(self, answers: Answers) -> None:
        """Begin texts."""
        self.answers, self.forwards, self.prefilled = answers, 0, False

    def put(self, value: Tensor) -> None:
        """Record the time of the first tokens; the prompt may come before any forward pass."""
        if self.forwards and not self.prefilled:
            self.prefilled = True
            for number in range(len(self.answers.token_ids)):
                self.answers.add(number, [])

    def end(self) -> None:
        """Do nothing: transformers calls it after the last tokens."""

    def _count(self, *_: Any) -> None:
        self.forwards += 1


def load_dflash(folder: Path, dtype: torch.dtype) -> Any:
    """Load a drafter, without its AR head, as the assistant that transformers has for its DFlash.

    transformers 5.24 has one class for it, which has the layers of every DFlash drafter.
    """
    settings = read_config(folder)
    settings.setdefault("rope_theta", rope_parameters(settings)["rope_theta"])
    settings |= settings.pop("dflash_config") | {"model_type": "muse_glimmer_assistant"}
    settings |= {"architectures": ["DFlashDraftModel"], "treeflash_config": None}
    settings = {name: value for name, value in settings.items() if value is not None}
    model = MuseGlimmerAssistantModel(MuseGlimmerAssistantConfig(**settings))
    names = {
        "fc.weight": "encoder.fc.weight",
        "hidden_norm.weight": "encoder.output_norm_enc.weight",
    }
    tensors = {canonical_name(name): tensor for name, tensor in read_tensors(folder).items()}
    model.load_state_dict(
        {
            names.get(name, name): torch.from_numpy(tensor)
            for name, tensor in tensors.items()
            if not name.startswith("ar_approximation")
        }
    )
    return model.to(dtype).eval()


def load(setup: dict[str, Any]) -> tuple[dict, Any]:
    """Load the target and the drafter, if given."""
    device = setup["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "auto" if setup["dtype"] == "auto" else getattr(torch, setup["dtype"])
    model, found = AutoModelForCausalLM.from_pretrained(
        setup["target"], dtype=dtype, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        # transformers only warns, and fills them with random numbers.
        raise ValueError(f"{setup['target']} has no {missing[0]} for transformers")
    stop = setup["stop_token_ids"]
    pad = stop[0] if stop else 0
    # A checkpoint's own settings may sample or penalise repetition.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stop or None, pad_token_id=pad
    )
    model = model.to(device).eval()
    clock = Clock(model)
    options: dict[str, dict[str, Any]] = {"generate": {}}
    skipped = {}
    if setup["drafter"]:
        dflash = load_dflash(Path(setup["drafter"]), model.dtype).to(model.device)
        loop = partial(generate, streamer=clock)
        options["dflash"] = {"assistant_model": dflash, "speculation_type": "dflash"}
        options["treeflash"] = {"custom_generate": loop, "drafter": setup["drafter"]}
    else:
        skipped = dict.fromkeys(("dflash", "treeflash"), "needs a drafter: --drafter FOLDER_OR_ID")

    def decode(prompts: list[list[int]], method: str, budget: object, max_tokens: int) -> dict:
        width = max(map(len, prompts))
        padded = [[pad] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        answers = Answers(len(prompts))
        clock.start(answers)
        output = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_tokens,
            streamer=clock,
            **options[method],
        )
        for number, token_ids in enumerate(output[:, width:].tolist()):
            ends = (n + 1 for n, token in enumerate(token_ids) if token in stop)
            answers.add(number, token_ids[: next(ends, None)])
        return answers.reply(clock.forwards - 1)

    packages = ("transformers", "torch")
    return describe(list(options), model.device, model.dtype, packages, skipped), decode


if __name__ == "__main__":
    serve(load)
