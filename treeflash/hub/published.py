"""The published drafters of targets, and the names by which targets are recognised."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from treeflash.config import AUTO

DEFAULT_TARGET = "HuggingFaceTB/SmolLM2-135M-Instruct"
PRECISION = (
    r"((-mlx|-awq|-gptq|-optiq|-unsloth|-bnb)*"
    r"-(\d+bit|int[48]|bf16|fp16|fp8|mxfp[48]|nvfp4|awq|gptq)(-q\d|-awq|-gptq|-dwq[\w-]*)?"
    r"|(-ud|\.i1)?[-.](i?q\d(_\w+)?|b?f16|f32))?(-gguf)?$"
)
"""Suffix of the names of targets in another precision, as publishers of conversions write it."""
BUNDLED_DRAFTER = "smollm2-135m-treeflash"
DEEPSPEC_SYSTEM = "You are a helpful assistant."
"""The system message of the texts that DeepSpec and many others train on."""


@dataclass(frozen=True, kw_only=True)
class PublishedDrafter:
    """A drafter, by its hub id or bundled name, and the prompts that it was trained on."""

    name: str
    thinking: bool = False
    system: str | None = None


def _drafters(*names: str, thinking: bool = False) -> tuple[PublishedDrafter, ...]:
    systems = (DEEPSPEC_SYSTEM if name.startswith("deepseek-ai/") else None for name in names)
    return tuple(
        PublishedDrafter(name=name, thinking=thinking, system=system)
        for name, system in zip(names, systems, strict=True)
    )


# The first drafter of a target is the default. Drafters with a conditional head come before DFlash,
# because they serve every method.
_DRAFTERS_BY_TARGET = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _drafters(BUNDLED_DRAFTER),
    "Qwen/Qwen3-1.7B": _drafters("AngelSlim/Qwen3-1.7B_eagle3"),
    "Qwen/Qwen3-4B": _drafters(
        "peerrh/treeflash-qwen3-4b",
        "deepseek-ai/dspark_qwen3_4b_block7",
        "Huang2020/Qwen3-4B-Domino-b16",
        "deepseek-ai/dflash_qwen3_4b_block7",
        "RedHatAI/Qwen3-4B-speculator.dflash2",
        "z-lab/Qwen3-4B-DFlash-b16",
        "deepseek-ai/eagle3_qwen3_4b_ttt7",
        "AngelSlim/Qwen3-4B_eagle3",
    ),
    "Qwen/Qwen3-8B": _drafters(
        "peerrh/treeflash-qwen3-8b",
        "deepseek-ai/dspark_qwen3_8b_block7",
        "Huang2020/Qwen3-8B-Domino-b16",
        "deepseek-ai/dflash_qwen3_8b_block7",
        "RedHatAI/Qwen3-8B-speculator.dflash2",
        "RedHatAI/Qwen3-8B-speculator.dflash",
        "z-lab/Qwen3-8B-DFlash-b16",
        "JetSpec/jetspec-qwen3-8b",
        "deepseek-ai/eagle3_qwen3_8b_ttt7",
        "RedHatAI/Qwen3-8B-speculator.peagle",
        "RedHatAI/Qwen3-8B-speculator.eagle3",
        "Dogacel/Qwen3-8B-DSpark",
    ),
    "Qwen/Qwen3-14B": _drafters(
        "deepseek-ai/dspark_qwen3_14b_block7",
        "deepseek-ai/dflash_qwen3_14b_block7",
        "deepseek-ai/eagle3_qwen3_14b_ttt7",
        "RedHatAI/Qwen3-14B-speculator.eagle3",
    ),
    "Qwen/Qwen3-32B": _drafters(
        "deepseek-ai/dspark_qwen3_32b_block7", "RedHatAI/Qwen3-32B-speculator.eagle3"
    ),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": _drafters(
        "peerrh/treeflash-qwen3-coder-30b-a3b",
        "z-lab/Qwen3-Coder-30B-A3B-DFlash",
        "lmsys/SGLang-EAGLE3-Qwen3-Coder-30B-A3B-Instruct-SpecForge",
    ),
    "Qwen/Qwen3-30B-A3B": _drafters(
        "RedHatAI/Qwen3-30B-A3B-speculator.dflash", "JetSpec/jetspec-qwen3-30b-a3b"
    ),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _drafters(
        "RedHatAI/Qwen3-30B-A3B-Instruct-2507-speculator.dflash",
        "RedHatAI/Qwen3-30B-A3B-Instruct-2507-speculator.eagle3",
        "lmsys/SGLang-EAGLE3-Qwen3-30B-A3B-Instruct-2507-SpecForge-Nex",
    ),
    "Qwen/Qwen3-30B-A3B-Thinking-2507": _drafters(
        "RedHatAI/Qwen3-30B-A3B-Thinking-2507-speculator.eagle3", thinking=True
    ),
    **{
        f"Qwen/{name}": _drafters(f"RedHatAI/{name}-speculator.eagle3")
        for name in ("Qwen3-235B-A22B", "Qwen3-235B-A22B-Instruct-2507")
    },
    **{
        f"LiquidAI/LFM2.5-{size}": _drafters(f"LiquidAI/LFM2.5-{size}-DSpark")
        for size in ("1.2B-Instruct", "2.6B", "8B-A1B", "24B-A2B", "VL-3B")
    },
    "JetBrains/Mellum2-12B-A2.5B-Thinking": _drafters(
        "RedHatAI/Mellum2-12B-A2.5B-Thinking-speculator.dflash", thinking=True
    ),
    "openbmb/MiniCPM5-2B": _drafters("openbmb/MiniCPM5-2B-DSpark"),
    **dict.fromkeys(
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"),
        _drafters(
            "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat",
            "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3",
        ),
    ),
    "meta-llama/Llama-3.3-70B-Instruct": _drafters(
        "RedHatAI/Llama-3.3-70B-Instruct-speculator.eagle3"
    ),
    "google/gemma-4-31B-it": _drafters(
        "RedHatAI/gemma-4-31B-it-speculator.dspark",
        "RedHatAI/gemma-4-31B-it-speculator.dflash2",
        "RedHatAI/gemma-4-31B-it-speculator.dflash",
        "z-lab/gemma-4-31B-it-DFlash",
        "google/gemma-4-31B-it-assistant",
        "RedHatAI/gemma-4-31B-it-speculator.eagle3",
    ),
    "google/gemma-4-26B-A4B-it": _drafters(
        "z-lab/gemma-4-26B-A4B-it-DFlash",
        "JetSpec/jetspec-gemma4-26B-A4B0-it",
        "google/gemma-4-26B-A4B-it-assistant",
        "RedHatAI/gemma-4-26B-A4B-it-speculator.eagle3",
    ),
    "google/gemma-4-12B-it": _drafters(
        "deepseek-ai/dspark_gemma4_12b_block7",
        "deepseek-ai/dflash_gemma4_12b_block7",
        "z-lab/gemma4-12B-it-DFlash",
        "google/gemma-4-12B-it-assistant",
        "deepseek-ai/eagle3_gemma4_12b_ttt7",
    ),
    **{
        f"google/gemma-4-{size}-it": _drafters(f"google/gemma-4-{size}-it-assistant")
        for size in ("E4B", "E2B")
    },
    **{
        f"Qwen/Qwen3.5-{size}": _drafters(f"z-lab/Qwen3.5-{size}-DFlash", thinking=True)
        for size in ("4B", "9B", "27B", "35B-A3B", "122B-A10B", "397B-A17B")
    },
    "Qwen/Qwen3.6-27B": _drafters("JetBrains/Qwen3.6-27B-DFlash2", "z-lab/Qwen3.6-27B-DFlash"),
    "Qwen/Qwen3.6-35B-A3B": _drafters(
        "incoai/Qwen3.6-35B-A3B-DFlash2",
        "RedHatAI/Qwen3.6-35B-A3B-speculator.dspark",
        "z-lab/Qwen3.6-35B-A3B-DFlash",
        "JetSpec/jetspec-Qwen3.6-35B-A3B",
    ),
    "Qwen/Qwen3.8-27B": _drafters(
        "z-lab/Qwen3.8-27B-DFlash2",
        "RadixArk/Qwen3.8-27B-DSpark",
        "RedHatAI/Qwen3.8-27B-speculator.dspark",
    ),
    "Qwen/Qwen3.8-Flash-Next": _drafters("incoai/Qwen3.8-Flash-Next-DFlash2"),
    "Qwen/Qwen3-Coder-Next": _drafters("z-lab/Qwen3-Coder-Next-DFlash"),
    "openai/gpt-oss-20b": _drafters(
        "z-lab/gpt-oss-20b-DFlash",
        "JetSpec/jetspec-gpt-oss-20b",
        "RedHatAI/gpt-oss-20b-speculator.eagle3",
    ),
    "openai/gpt-oss-120b": _drafters(
        "z-lab/gpt-oss-120b-DFlash",
        "RedHatAI/gpt-oss-120b-speculator.eagle3",
        "lmsys/EAGLE3-gpt-oss-120b-bf16",
    ),
    **{
        f"nvidia/{name}": _drafters(f"RedHatAI/{name}-speculator.dflash")
        for name in (
            "NVIDIA-Nemotron-3-Super-120B-A12B",
            "NVIDIA-Nemotron-3-Ultra-550B-A55B",
        )
    },
    "meta-models/Muse-Glimmer-30B": _drafters(
        "z-lab/Muse-Glimmer-30B-DFlash2", "meta-models/Muse-Glimmer-30B-assistant"
    ),
}
KNOWN_TARGETS = tuple(_DRAFTERS_BY_TARGET)
"""Hub ids of the targets that have a published drafter."""
PUBLISHED_DRAFTERS = {
    target.rpartition("/")[2].lower(): drafters for target, drafters in _DRAFTERS_BY_TARGET.items()
}
"""By target: the last part of its name, in lower case."""


def published_drafter(target: str | None) -> str | None:
    """Return the best known drafter of a target, a hub id or the bundled name, or None."""
    drafters = published_drafters(target)
    return drafters[0].name if drafters else None


def published_drafters(target: str | None) -> tuple[PublishedDrafter, ...]:
    """Return the known drafters of a target, the best first.

    The last part of the target's name is looked up, without regard to case and to a precision such
    as `-4bit` or `-MLX-4bit`. If it is unknown, the card in a local folder may name the original.
    """
    folder = expand_home(target or DEFAULT_TARGET)
    if drafters := PUBLISHED_DRAFTERS.get(family_name(folder)):
        return drafters
    original = original_name(folder)
    return () if original is None else PUBLISHED_DRAFTERS.get(family_name(Path(original)), ())


def expand_home(name: str) -> Path:
    """Return the path that a name may be, in which `~` is a home; it may also be a hub id."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (leaves the home of an unknown user)


def original_name(folder: Path) -> str | None:
    """Return the name of the model that a folder's was converted from, as its card says.

    None if there is no such card: the weights of other models with a base were trained further.
    """
    card = folder / "README.md"
    if not card.is_file():
        return None
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    if not re.search(r"^(library_name: mlx|base_model_relation: quantized)$", head, re.MULTILINE):
        return None
    found = re.search(r"^base_model:\s*(?:-\s*)?([\w./-]+)", head, re.MULTILINE)
    return found and found[1]


def family_name(folder: Path) -> str:
    """Return the last part of a model's name, in lower case and without a precision.

    The folder may also be a hub id, with the quantisation of a GGUF file or without.
    """
    name = model_name(folder).rpartition("/")[2].partition(":")[0]
    return re.sub(PRECISION, "", name.lower())


def model_name(folder: Path) -> str:
    """Return the hub id of a folder in the hub's cache, else the name of a folder or GGUF file."""
    folder = folder.absolute()
    repository = folder.parents[1].name if len(folder.parents) > 1 else ""
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.stem if folder.suffix.lower() == ".gguf" else folder.name


def drafter_training(drafter: str | None, target: str | None) -> PublishedDrafter:
    """Return the prompts that a drafter was trained on, by the names that `resolve_drafter` takes.

    An unknown drafter gets what is most common: thinking off and no system message.
    """
    name = (published_drafter(target) if drafter in (None, AUTO) else drafter) or ""
    if Path(name).is_dir():
        name = model_name(Path(name))
    known = chain.from_iterable(PUBLISHED_DRAFTERS.values())
    return next((d for d in known if d.name.lower() == name.lower()), PublishedDrafter(name=name))
