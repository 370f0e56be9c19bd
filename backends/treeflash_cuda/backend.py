"""Loading: the entry point of the PyTorch backend."""

from __future__ import annotations

import atexit
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import TypeAlias

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from treeflash.config import LoadConfig
from treeflash.decoding.probe import check_trees
from treeflash.decoding.snapshots import MOST
from treeflash.drafter_config import DrafterConfig
from treeflash.drafters.loading import load_tensors
from treeflash.errors import BackendError, ConfigError
from treeflash_cuda.arena import Arena
from treeflash_cuda.attention_kernels import flash_kernels
from treeflash_cuda.drafter import Drafter
from treeflash_cuda.drafter_model import DrafterModel, Rotary
from treeflash_cuda.head import ARHead
from treeflash_cuda.head_weights import make_module
from treeflash_cuda.linear import IN_DRAFTER, fuse_linears, pack_linears
from treeflash_cuda.output_stage import OwnVocabulary
from treeflash_cuda.parallel import LeaderState, LeaderVerifier, end, follow
from treeflash_cuda.ranks import ranks
from treeflash_cuda.recurrent import RecurrentHead
from treeflash_cuda.state import State
from treeflash_cuda.target import Target
from treeflash_cuda.verifier import Verifier

Head: TypeAlias = ARHead | RecurrentHead


SLABS = 64
"""On a GPU, this fraction of its memory is allocated for keys and values at once."""


class CudaBackend:
    """`treeflash.decoding.interfaces.Backend` in PyTorch."""

    name = "cuda"

    def __init__(
        self,
        target: Target,
        drafter: DrafterModel | None,
        head: Head | None,
        *,
        draft_window: int | None = None,
    ) -> None:
        """Hold a target, and a drafter for it; see `LoadConfig.draft_window`."""
        self.target = target
        self.drafter_model = drafter
        self.drafter_arena = Arena(len(drafter.layers)) if drafter else None
        self.verifier = (LeaderVerifier if target.split else Verifier)(target, drafter)
        self.state_class = LeaderState if target.split else State
        self.drafter = Drafter(drafter, target, draft_window) if drafter else None
        self.head = head
        self.device = str(target.device)
        self.device_name = device_name(target.device)
        self.dtype = str(target.dtype).removeprefix("torch.")
        self.vocab_size = target.vocab_size
        self.max_positions = target.max_positions
        self.drafter_config: DrafterConfig | None = drafter.config if drafter else None

    def open(self, capacity: int, *, drafts: bool) -> State:
        """See `Backend.open`."""
        config = self.drafter_config if drafts else None
        arena = self.drafter_arena if drafts else None
        block = config.block_size if config else 0
        return self.state_class(self.target.arena, arena, capacity, block, self.target.transposed)

    def state_nbytes(self, capacity: int, *, drafts: bool) -> int:
        """See `Backend.state_nbytes`."""
        nbytes = self.target.arena.nbytes(capacity)
        nbytes += (1 + MOST) * self.target.states_nbytes
        if drafts and (config := self.drafter_config):
            heads = config.num_hidden_layers * config.num_key_value_heads
            column = 2 * heads * config.head_dim * self.target.dtype.itemsize
            nbytes += (capacity + config.block_size) * column
        return nbytes

    def memory_bytes(self) -> int:
        """See `Backend.memory_bytes`."""
        if self.target.device.type == "cuda":
            parts = {part for part, _ in self.target.spans or [(self.target.device, 0)]}
            return sum(torch.cuda.max_memory_allocated(part) for part in parts)
        import resource  # POSIX only, and only needed here

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def load(target: Path, drafter: Path | None, config: LoadConfig) -> CudaBackend:
    """See `Loader`."""
    if config.draft_bits:
        raise ConfigError("the cuda backend does not quantise drafters; leave --draft-bits out")
    split = ranks() > 1
    model = load_target(target, config, pack=not config.compile and not split, split=split)
    if split:
        if dist.get_rank() > 0:
            follow(model)
            raise SystemExit(0)
        atexit.register(end)
    if config.compile:
        for layer in model.layers:
            layer.compile()
    # A graph belongs to one device.
    model.graphs.enabled = config.cuda_graphs and not split and config.device_map is None
    if model.graphs.enabled and config.kv_bits is None and model.device.type == "cuda":
        # Graphs are bound to allocations: a large one serves many texts. Of one in 8 bits every
        # pass would convert all columns.
        memory = torch.cuda.get_device_properties(model.device).total_memory
        model.arena.least_nbytes = memory // SLABS
    if model.transposed is not None and model.device.type == "cuda":
        warnings.warn("models with recurrent layers run without CUDA graphs", stacklevel=2)
    if drafter is None:
        return CudaBackend(model, None, None)
    drafter_model, head = load_drafter(drafter, model)
    fuse_linears(drafter_model, IN_DRAFTER)
    pack_linears(drafter_model)
    if head is not None:
        pack_linears(head.module)
    model.capture(drafter_model.config.target_layer_ids)
    backend = CudaBackend(model, drafter_model, head, draft_window=config.draft_window)
    check_trees(backend)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)  # of loading and checking
    return backend


def load_target(folder: Path, config: LoadConfig, *, pack: bool, split: bool = False) -> Target:
    """A target that runs draft trees; see `Target`, `Target.prepare`. Raises what `Loader` does."""
    device = choose_device(config.device)
    dtype = getattr(torch, config.dtype) if config.dtype else None
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    if config.device_map is not None and (split or config.device is not None):
        raise ConfigError("--device-map chooses the devices of one process; leave --device out")
    model = Target(folder, device, dtype, split=split, device_map=config.device_map)
    model.prepare(pack=pack, kv_bits=config.kv_bits)
    for part, _ in model.spans or [(device, len(model.layers))]:
        model.kernels, reason = flash_kernels(part, model.dtype, model.config)
        if model.kernels is None:
            break
    if reason:
        warnings.warn(f"attention over long texts will be slow: {reason}", stacklevel=2)
    return model


def choose_device(name: str | None) -> torch.device:
    """The device with a name; None is the first CUDA device.

    Raises:
        BackendError: there is no such device.
    """
    try:
        device = torch.device(name or "cuda")
    except RuntimeError:
        raise BackendError(f"unknown device {name!r}; use cuda, cuda:1, ... or cpu") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise BackendError(f"the cuda backend runs on cuda or cpu, not on {name!r}")
    if not torch.cuda.is_available():
        raise BackendError("no CUDA device is available; pass --device cpu to run on the CPU")
    own = int(os.environ.get("LOCAL_RANK", "0"))  # of a process that `torchrun` started
    index = own if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise BackendError(
            f"there is no {device}: this machine has {torch.cuda.device_count()} CUDA device(s)"
        )
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """The model of a device: the GPU's, or the processor's as far as Python knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def load_drafter(folder: Path, target: Target) -> tuple[DrafterModel, Head | None]:
    """Read a drafter and check that it belongs to the target."""
    tensors = load_tensors(
        folder,
        load_file,
        hidden_size=target.embeddings.shape[1],
        vocab_size=target.vocab_size,
        num_hidden_layers=len(target.layers),
    )
    config = tensors.config
    with torch.device("meta"):  # no memory for weights that are replaced
        model = DrafterModel(config)
    model.load_state_dict(tensors.backbone, assign=True)
    model.rotary = Rotary(config)
    model = model.to(target.device, target.dtype).eval()
    model.own = OwnVocabulary(tensors.vocabulary, target)
    if config.head is None:
        return model, None
    with torch.device("meta"):
        module = make_module(config, tensors.head_size, target.vocab_size)
    module.load_state_dict(tensors.head, assign=True)
    module = module.to(target.device)
    kind = RecurrentHead if config.head_state_size else ARHead
    return model, kind(module.to(target.dtype).eval(), model, target)
