"""TreeFlash drafters in vLLM, as chains: a plugin of the entry point group `vllm.general_plugins`.

vLLM verifies chains, not trees. A TreeFlash folder drafts there as `--method treeflash-chain` does:

    vllm serve TARGET --speculative-config \
        '{"method": "dflash", "model": "FOLDER", "num_speculative_tokens": 9}'

The architecture is `TreeFlashDraftModel` in published folders, to whose name vLLM adds `DFlash`.
"""

from __future__ import annotations

ARCHITECTURES = ("TreeFlashDraftModel", "DFlashTreeFlashDraftModel")


def register() -> None:
    """Register the model class; vLLM calls it in each of its processes."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, "treeflash_vllm.model:TreeFlashDraftModel")
