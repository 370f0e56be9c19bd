"""The published drafters that are known for a target, and how they were trained."""

from __future__ import annotations

from dataclasses import dataclass

BUNDLED_DRAFTER = "smollm2-135m-treeflash"
DEEPSPEC_SYSTEM = "You are a helpful assistant."
"""What all of DeepSpec's training texts begin with, and many others'."""


@dataclass(frozen=True, kw_only=True)
class PublishedDrafter:
    """A drafter, and the prompts of the texts that it was trained on.

    Attributes:
        name: hub id, or the name of the bundled one.
        thinking: whether thinking was on.
        system: the system message; None for none.
    """

    name: str
    thinking: bool = False
    system: str | None = None


def _deepspec(name: str) -> PublishedDrafter:
    return PublishedDrafter(name=f"deepseek-ai/{name}", system=DEEPSPEC_SYSTEM)


# By target (last part of its name, lower case). A drafter with a conditional head serves every
# method, and so comes before a DFlash one: the first is the default.
PUBLISHED_DRAFTERS: dict[str, tuple[PublishedDrafter, ...]] = {
    "smollm2-135m-instruct": (PublishedDrafter(name=BUNDLED_DRAFTER),),
    "qwen3-4b": (
        PublishedDrafter(name="peerrh/treeflash-qwen3-4b"),
        _deepspec("dspark_qwen3_4b_block7"),
        _deepspec("dflash_qwen3_4b_block7"),
        PublishedDrafter(name="RedHatAI/Qwen3-4B-speculator.dflash2"),
        PublishedDrafter(name="z-lab/Qwen3-4B-DFlash-b16"),
    ),
    "qwen3-8b": (
        PublishedDrafter(name="peerrh/treeflash-qwen3-8b"),
        _deepspec("dspark_qwen3_8b_block7"),
        _deepspec("dflash_qwen3_8b_block7"),
        PublishedDrafter(name="RedHatAI/Qwen3-8B-speculator.dflash2"),
        PublishedDrafter(name="RedHatAI/Qwen3-8B-speculator.dflash"),
        PublishedDrafter(name="z-lab/Qwen3-8B-DFlash-b16"),
    ),
    "qwen3-14b": (
        _deepspec("dspark_qwen3_14b_block7"),
        _deepspec("dflash_qwen3_14b_block7"),
    ),
    "qwen3-32b": (_deepspec("dspark_qwen3_32b_block7"),),
    "qwen3-coder-30b-a3b-instruct": (
        PublishedDrafter(name="peerrh/treeflash-qwen3-coder-30b-a3b"),
        PublishedDrafter(name="z-lab/Qwen3-Coder-30B-A3B-DFlash"),
    ),
    "qwen3-30b-a3b": (PublishedDrafter(name="RedHatAI/Qwen3-30B-A3B-speculator.dflash"),),
    "qwen3-30b-a3b-instruct-2507": (
        PublishedDrafter(name="RedHatAI/Qwen3-30B-A3B-Instruct-2507-speculator.dflash"),
    ),
    "minicpm5-2b": (PublishedDrafter(name="openbmb/MiniCPM5-2B-DSpark"),),
    "llama-3.1-8b-instruct": (
        PublishedDrafter(name="z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat"),
    ),
    "meta-llama-3.1-8b-instruct": (
        PublishedDrafter(name="z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat"),
    ),
    "gemma-4-31b-it": (
        PublishedDrafter(name="RedHatAI/gemma-4-31B-it-speculator.dspark"),
        PublishedDrafter(name="RedHatAI/gemma-4-31B-it-speculator.dflash2"),
        PublishedDrafter(name="RedHatAI/gemma-4-31B-it-speculator.dflash"),
        PublishedDrafter(name="z-lab/gemma-4-31B-it-DFlash"),
    ),
    "gemma-4-26b-a4b-it": (PublishedDrafter(name="z-lab/gemma-4-26B-A4B-it-DFlash"),),
    "gemma-4-12b-it": (PublishedDrafter(name="z-lab/gemma4-12B-it-DFlash"),),
    **{
        # Trained with thinking on, unlike all others.
        f"qwen3.5-{size.lower()}": (
            PublishedDrafter(name=f"z-lab/Qwen3.5-{size}-DFlash", thinking=True),
        )
        for size in ("4B", "9B", "27B", "35B-A3B", "122B-A10B", "397B-A17B")
    },
    "qwen3.6-27b": (PublishedDrafter(name="z-lab/Qwen3.6-27B-DFlash"),),
    "qwen3.6-35b-a3b": (
        PublishedDrafter(name="incoai/Qwen3.6-35B-A3B-DFlash2"),
        PublishedDrafter(name="RedHatAI/Qwen3.6-35B-A3B-speculator.dspark"),
        PublishedDrafter(name="z-lab/Qwen3.6-35B-A3B-DFlash"),
    ),
    "qwen3.8-27b": (
        PublishedDrafter(name="z-lab/Qwen3.8-27B-DFlash2"),
        PublishedDrafter(name="RadixArk/Qwen3.8-27B-DSpark"),
        PublishedDrafter(name="RedHatAI/Qwen3.8-27B-speculator.dspark"),
    ),
    "qwen3-coder-next": (PublishedDrafter(name="z-lab/Qwen3-Coder-Next-DFlash"),),
    "gpt-oss-20b": (PublishedDrafter(name="z-lab/gpt-oss-20b-DFlash"),),
    "gpt-oss-120b": (PublishedDrafter(name="z-lab/gpt-oss-120b-DFlash"),),
}


def known_drafter(name: str) -> PublishedDrafter:
    """The entry of a hub id, without regard to case; one without a name is trained as most are."""
    for drafters in PUBLISHED_DRAFTERS.values():
        for drafter in drafters:
            if drafter.name.lower() == name.lower():
                return drafter
    return PublishedDrafter(name=name)
