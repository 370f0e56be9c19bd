"""The dtype of models where the user names none: on a CPU half precision where it is exact.

A GPU has the checkpoint's, unless it has no bfloat16. A checkpoint in half precision takes half the
memory on a CPU, and less time. Its texts must not depend on drafts, so exact mode decides. What is
known about it before weights are read is asked first, because weights that exact mode refuses later
are read once more, in float32.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from treeflash.config import LoadConfig
from treeflash.decoding.probe import INEXACT
from treeflash.drafters.folder import is_quantised
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.cpu.low_bit_loading import is_packed
from treeflash_cuda.decoder.facts import DecoderFacts, decoder_facts
from treeflash_cuda.decoder.plain_config import target_config
from treeflash_cuda.exact import products_of
from treeflash_cuda.linear import uses_fbgemm, uses_onednn
from treeflash_cuda.target import RECURRENT_LAYERS, read_model_config, refuse_stateful, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HALF = torch.bfloat16, torch.float16
BFLOAT16 = 8, 0
"""The first compute capability whose tensor cores have bfloat16."""


class InexactError(UnsupportedModelError):
    """Exact mode was asked for, and the target cannot have it."""


def half_dtype(folder: Path, config: LoadConfig) -> str | None:
    """Return the checkpoint's dtype if exact mode may hold in it on this CPU; None for float32.

    Raises:
        InexactError: exact mode is known to be impossible for this target.
        CheckpointError, UnsupportedModelError: the target cannot be loaded in any dtype.
    """
    if config.exact is False or config.kv_bits or config.compile:
        return None
    model = target_config(folder)
    refuse_stateful(model)
    dtype = stored_dtype(model)
    if dtype not in HALF or (is_quantised(model.to_dict()) and not is_packed(model)):
        return None
    if not (uses_onednn(dtype) or uses_fbgemm(dtype)):
        return None
    try:
        refuse_inexact(model)
    except UnsupportedModelError as error:
        raise InexactError(str(error)) from error
    return str(dtype).removeprefix("torch.")


def gpu_dtype(folder: Path, device: torch.device) -> str | None:
    """Return the dtype of a target on a GPU without bfloat16, with a warning; None for its own.

    GPUs before compute capability 8.0, such as the T4, compute float16 in its place.
    """
    if torch.cuda.get_device_capability(device) >= BFLOAT16:
        return None
    if stored_dtype(read_model_config(folder)) != torch.bfloat16:
        return None
    warnings.warn(
        f"{torch.cuda.get_device_name(device)} has no bfloat16, so the models run in float16; "
        "prompts run without FlashAttention, and kernels without tensor cores",
        stacklevel=2,
    )
    return "float16"


def stored_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """Return the dtype that a configuration names for the decoder's weights."""
    return config.dtype or config.get_text_config().dtype


def refuse_inexact(config: PreTrainedConfig) -> None:
    """Raise an UnsupportedModelError for a model that is known to be inexact on a CPU."""
    text = config.get_text_config()
    if set(getattr(text, "layer_types", None) or ()) & RECURRENT_LAYERS:
        raise UnsupportedModelError(f"{INEXACT}: it does not support recurrent layers")
    if isinstance(decoder_facts(config), DecoderFacts):
        return  # layers of our own say so when they are loaded
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"{INEXACT}: it does not support soft-capped scores")
    if (model := skeleton(text)) is not None:
        list(products_of(model))
