"""Loading a target: its layers, own or of transformers, and its operations."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from treeflash.config import LoadConfig
from treeflash.decoding.passed_checks import PassedChecks, passed_checks
from treeflash.errors import BackendError, UnsupportedModelError
from treeflash_cuda.cpu import low_bit_loading
from treeflash_cuda.cpu.decoder_target import CpuTarget
from treeflash_cuda.cpu.default_dtype import InexactError
from treeflash_cuda.cpu.threads import cpu_threads
from treeflash_cuda.decoder.facts import decoder_facts
from treeflash_cuda.decoder.plain_config import PlainConfig, target_config
from treeflash_cuda.decoder.target import DecoderTarget
from treeflash_cuda.decoder.weights import PLACES, Checkpoint
from treeflash_cuda.device import (
    choose_device,
    device_facts,
    device_name,
    driver_version,
    one_of_each_kind,
)
from treeflash_cuda.gpu.decoder_target import GpuTarget, decoder_shapes
from treeflash_cuda.gpu.kernel_loading import load_operations
from treeflash_cuda.gpu.parallel import (
    process_count,
    reasons_everywhere,
    succeeded_everywhere,
)
from treeflash_cuda.gpu.prompt_attention import CausalAttention, load_flash_attention
from treeflash_cuda.images import find_processor
from treeflash_cuda.operations import Operations, Shapes
from treeflash_cuda.target import Target, read_model_config, refuse_stateful
from treeflash_cuda.visible_keys import PAGE

if TYPE_CHECKING:
    # Modules of `hf` import transformers' models, which takes seconds: only functions that run such
    # a model import them.

    from treeflash_cuda.hf.model_target import ModelTarget


def load_target(
    folder: Path,
    config: LoadConfig,
    *,
    pack: bool,
    processes: int = 1,
    passed: PassedChecks | None = None,
) -> Target:
    """Load a target that runs draft trees; see `Target`. Raises the errors of `Loader`.

    The device is prepared. Checks of exact mode that were `passed` do not run.
    """
    device = choose_device(config.device)
    if config.threads is not None:
        cpu_threads().choose(config.threads)
    elif device.type == "cpu":
        cpu_threads()  # what other programs use is measured from now on, while weights are read
    dtype = getattr(torch, config.dtype) if config.dtype else None
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    model = read_target(folder, config, device, dtype, pack=pack, processes=processes)
    others = config.kv_bits, config.compile, config.device_map, processes > 1  # refuse exact mode
    is_half = model.dtype in (torch.bfloat16, torch.float16)
    is_default = device.type == "cpu" and is_half and not any(others)
    if is_default if config.exact is None else config.exact:
        with inexact_if_refused(model, config):
            model.make_exact(passed or PassedChecks())
    if not isinstance(model, DecoderTarget):
        cast("ModelTarget", model).choose_passes()
    return model


def read_target(
    folder: Path,
    settings: LoadConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    pack: bool,
    processes: int,
) -> Target:
    """Read a target's weights, with layers of our own or as a model of transformers."""
    config = target_config(folder)
    refuse_stateful(config)
    processor = find_processor(folder, config, settings, split=processes > 1)
    decoder = load_decoder(
        folder,
        config,
        settings,
        device,
        dtype,
        pack=pack,
        processes=processes,
        images=not isinstance(processor, str),
    )
    if isinstance(decoder, DecoderTarget):
        decoder.processor = processor
        return decoder
    from treeflash_cuda.hf.model_target import ModelTarget

    if isinstance(config, PlainConfig):
        config = read_model_config(folder)
    model = ModelTarget.load(
        folder, config, device, dtype, settings, processor, pack=pack, processes=processes
    )
    model.layers_from = f"transformers, because {decoder}"
    add_kernels(model)
    return model


def load_decoder(
    folder: Path,
    config: Any,  # see `target_config`
    settings: LoadConfig,
    device: torch.device,
    dtype: torch.dtype | None,  # None for the checkpoint's
    *,
    pack: bool,  # see `ModelTarget`
    processes: int,
    images: bool = False,  # whether prompts may have images
) -> DecoderTarget | str:
    """Load a target with layers of our own; or return why it has none, as a clause.

    This alone decides which targets are models of transformers.
    """
    reasons = {
        "several devices have its layers": settings.device_map is not None or processes > 1,
        "its layers are compiled": settings.compile,
        "training reads its layers": not pack,
        "it reads images": images,
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        return reason
    facts = decoder_facts(config)
    if isinstance(facts, str):
        return facts
    checkpoint = Checkpoint(folder, config.to_dict())
    if checkpoint.foreign is not None:
        return checkpoint.foreign
    if settings.adapter is not None and checkpoint.low_bits is not None:
        return "adapters are not merged into weights of few bits"
    if settings.adapter is not None and checkpoint.place != PLACES[0]:
        return "its tensors have other names than the layers of its adapter"
    dtype = dtype or config.dtype or checkpoint.dtype
    shapes = decoder_shapes(facts, quantised=settings.kv_bits is not None)
    operations = load_target_operations(shapes, [device], dtype)
    made = checkpoint, config, facts, dtype, settings
    if operations is None:
        return CpuTarget.load(*made)
    reasons = {
        "kernels of other libraries multiply its few bits": checkpoint.low_bits is not None,
        "flash-linear-attention computes its prompts": facts.delta_nets is not None
        and find_spec("fla") is not None,
        "attention has no kernel here": not operations.runs_trees,
        "experts have no kernel here": "grouped_linear" in operations.reasons,
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        return reason
    prompt_attention = load_prompt_attention([device], dtype, shapes)
    return GpuTarget.load(*made, device, operations, prompt_attention)


def add_kernels(target: ModelTarget) -> None:
    """Let a target use the kernels that all its devices run, and under `torchrun` all ranks.

    A rank with another kernel would run other passes than the rest, which wait for each other.
    """
    shapes = model_shapes(target)
    operations = load_target_operations(shapes, target.devices, target.dtype)
    attend = load_prompt_attention(target.devices, target.dtype, shapes)
    if operations is not None:
        target.arena.page = PAGE
        if target.split:
            operations = operations.without(reasons_everywhere(operations.reasons))
            if not succeeded_everywhere(attend is not None):
                attend = None
    target.operations, target.prompt_attention = operations, attend


def load_target_operations(
    shapes: Shapes, devices: Sequence[torch.device], dtype: torch.dtype
) -> Operations | None:
    """Load the target's operations on GPUs; None on a CPU.

    A kernel runs where it passes its check on a GPU of each kind.
    """
    if devices[0].type != "cuda":
        return None
    first, *others = one_of_each_kind(devices)
    operations = load_kernels(shapes, first, dtype)
    for device in others:
        place = f"on {device}, {device_name(device)}, "
        reasons = load_kernels(shapes, device, dtype, place).reasons
        operations = operations.without({name: place + x for name, x in reasons.items()})
    return operations


def load_kernels(
    shapes: Shapes, device: torch.device, dtype: torch.dtype, place: str = ""
) -> Operations:
    """Load operations on a GPU, with a warning of those that have no kernel."""
    operations = load_operations(shapes, device, dtype)
    for line in operations.fallbacks:
        warnings.warn(place + line, stacklevel=2)
    return operations


def load_prompt_attention(
    devices: Sequence[torch.device], dtype: torch.dtype, shapes: Shapes
) -> CausalAttention | None:
    """Load the attention of long prompts, with a warning if it fails; None if a device has none."""
    attend: CausalAttention | None = None
    if shapes.softcap is not None or shapes.sinks:
        return None
    for device in devices:
        attend, reason = load_flash_attention(device, dtype, shapes)
        if reason:
            warnings.warn(f"prompts will be slow: {reason}", stacklevel=2)
        if attend is None:
            break
    return attend


def model_shapes(target: ModelTarget) -> Shapes:
    """Return the sizes of a model of transformers that kernels depend on."""
    config = target.config
    heads, hidden_size = config.num_attention_heads, config.hidden_size
    arena = target.state_arena
    return Shapes(
        heads=heads,
        kv_heads=heads // target.groups,
        head_dim=getattr(config, "head_dim", None) or hidden_size // heads,
        hidden_size=hidden_size,
        softcap=target.softcap,
        sinks=target.has_sinks,
        quantised=target.arena.dtype is not None,
        has_own_layers=False,
        recurrent=() if arena is None else arena.matrix_shapes,
        convolutions=() if arena is None else arena.tail_shapes,
    )


@contextmanager
def inexact_if_refused(target: Target, config: LoadConfig) -> Iterator[None]:
    """Go on without exact mode where it is refused, unless the configuration asks for it."""
    try:
        yield
    except UnsupportedModelError as error:
        if config.exact:
            raise InexactError(str(error)) from error
        target.make_inexact(str(error))


def bits_refusal(config: LoadConfig) -> str | None:
    """Return why a target's weights cannot keep few bits; see `low_bit_loading.bits_refusal`."""
    return low_bit_loading.bits_refusal(
        config, on_cpu=runs_on_cpu(config), processes=process_count()
    )


def runs_on_cpu(config: LoadConfig) -> bool:
    """Return whether a target runs on the CPU, as it does where no GPU can be used."""
    try:
        return choose_device(config.device).type == "cpu"
    except BackendError:
        return True


def kept_checks(target: Path, drafter: Path | None, config: LoadConfig) -> PassedChecks:
    """Find the checks that a pair has passed on this device with this PyTorch's settings."""
    device = choose_device(config.device)
    facts = (
        device,
        json.dumps(device_facts(device)),
        driver_version(),
        torch.__config__.show(),  # it names the instructions in use, too
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
    )
    adapter = None if config.adapter is None else Path(config.adapter)
    models = target, drafter, adapter
    return passed_checks(config.checks, models, config, "treeflash_cuda", facts)
