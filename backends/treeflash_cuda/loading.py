"""Loads a target by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_accelerate_available, logging

from treeflash.drafters.folder import read_config, weight_files
from treeflash.errors import BackendError, CheckpointError, UnsupportedModelError, is_out_of_memory
from treeflash_cuda.ranks import ranks

UNLIMITED = 1 << 20
"""Positions of models that have none."""


def read_model_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a folder, as transformers reads it.

    Raises:
        CheckpointError: it is damaged, or of a type that transformers lacks.
    """
    read_config(folder)  # its message about a damaged file is clearer
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is not usable: {_first_line(error)}"
        ) from error


def max_positions(config: Any) -> int:
    """Positions of the model; with longrope scaling, those before the frequencies change."""
    rope = getattr(config, "rope_parameters", None) or {}
    for part in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        # transformers picks the frequencies of a whole forward pass by its last position.
        if part.get("rope_type") == "longrope":
            return int(part["original_max_position_embeddings"])
    return int(getattr(config, "max_position_embeddings", None) or UNLIMITED)


def load_model(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    split: bool = False,
    device_map: str | None = None,
) -> PreTrainedModel:
    """The model of a folder in the Hugging Face format, for inference.

    Args:
        folder: with weights in safetensors files.
        config: what `read_model_config` returned for it.
        dtype: of all floating-point parameters; None is the checkpoint's own.
        device: for the weights.
        split: between the processes of `torchrun`, each of which loads its part.
        device_map: accelerate's, for several devices.

    Raises:
        CheckpointError: it is damaged or incomplete, or its weights do not fit its configuration.
        UnsupportedModelError: its weights are quantised, and a package for that is not installed.
    """
    weight_files(folder)
    # A quantised model must not be moved; others would be loaded twice.
    direct = device.type != "cpu" and is_accelerate_available()
    if device_map is not None and not is_accelerate_available():
        raise BackendError("--device-map needs the package accelerate: pip install accelerate")
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised and device.type != "cpu" and not direct:
        raise UnsupportedModelError(
            f"{folder} has quantised weights, which need the package accelerate: "
            "pip install accelerate"
        )
    placement: dict[str, Any] = {"device_map": {"": device}} if direct else {}
    if split:
        from transformers.distributed import DistributedConfig

        placement = {"distributed_config": DistributedConfig(tp_size=ranks(), tp_plan="auto")}
    if device_map is not None:
        placement = {"device_map": device_map}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **placement,
        )
        if not placement and not quantised:
            model = model.to(device)
    except ImportError as error:
        raise UnsupportedModelError(
            f"{folder} needs a package that is not installed ({_first_line(error)}); install it or "
            "use weights that are not quantised"
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder} lacks the tensor {missing[0]}")
    return model.eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
