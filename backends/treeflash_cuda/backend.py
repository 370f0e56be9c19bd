"""Loading: the entry point of the PyTorch backend."""

from __future__ import annotations

import atexit
import itertools
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from treeflash.config import LoadConfig, SamplingConfig, size_text
from treeflash.decoding.backend_base import OPTIONAL, BaseBackend, check_settings
from treeflash.decoding.image_processor import Processor
from treeflash.decoding.interfaces import DeviceReport, Prefill
from treeflash.decoding.mtp_head import MtpBlock
from treeflash.decoding.passed_checks import PassedChecks
from treeflash.decoding.sampling import Noise
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.config import DrafterShape
from treeflash.drafters.mtp_heads import refuse_missing_targets
from treeflash.errors import ConfigError, MemoryInUseError, is_out_of_memory
from treeflash_cuda.cache import KV_BITS
from treeflash_cuda.cpu.decoder_target import CpuTarget
from treeflash_cuda.cpu.default_dtype import InexactError, gpu_dtype, half_dtype
from treeflash_cuda.cpu.low_bit_loading import UNPACKED_BITS, keeps_bits, products_refusal
from treeflash_cuda.decoder.target import DecoderTarget
from treeflash_cuda.device import (
    backend_name,
    choose_device,
    device_facts,
    device_name,
    one_of_each_kind,
    prepare,
)
from treeflash_cuda.drafter import Drafter
from treeflash_cuda.drafter_loading import Head, Model, load_drafter
from treeflash_cuda.exact import LINEARS
from treeflash_cuda.gpu.graphs import GRAPH_ROWS, MAX_ROWS, power_of_two
from treeflash_cuda.gpu.kernel_loading import examined_shapes, load_operations
from treeflash_cuda.gpu.parallel import (
    LeaderState,
    LeaderVerifier,
    end,
    follow,
    messages,
    process_count,
    reserve_everywhere,
    succeeded_everywhere,
)
from treeflash_cuda.images import GivenFeatures, NoPictures, has_tower
from treeflash_cuda.linear import weights_by_format
from treeflash_cuda.memory import (
    FREE_MEMORY_SHARE,
    GRAPH_FACTOR,
    STATES_EACH,
    TABLE,
    WRAPPED_MEMORY_SHARE,
    make_tables,
    new_drafter_arena,
    pass_nbytes,
    reserve_memory,
    table_nbytes,
)
from treeflash_cuda.mtp_head import MtpDrafter, MtpModel, ParallelDrafter
from treeflash_cuda.operations import Operations
from treeflash_cuda.quantised_weights import BITS
from treeflash_cuda.state import State
from treeflash_cuda.target import PASS_NAME, Target
from treeflash_cuda.target_loading import (
    add_kernels,
    bits_refusal,
    inexact_if_refused,
    kept_checks,
    load_target,
    runs_on_cpu,
)
from treeflash_cuda.verifier import Verifier

if TYPE_CHECKING:
    # Modules of `hf` import transformers' models, which takes seconds: only functions that run such
    # a model import them.
    from transformers import PreTrainedModel


NEW_TOKENS = 16, 4, 1
"""New tokens of each sequence after which drafts are captured: their total is rounded up to a power
of four."""


class CudaBackend(BaseBackend):
    """`treeflash.decoding.interfaces.Backend` in PyTorch; see `LoadConfig.draft_window`.

    `memory_share` and `memory_gb` are for `reserve_memory`. Its name is `cpu` on a CPU, however it
    was chosen, so that what is kept by the name serves every choice.
    """

    def __init__(
        self,
        target: Target,
        drafter_model: Model | None,
        head: Head | None,
        *,
        draft_window: int | None = None,
        memory_share: float = FREE_MEMORY_SHARE,
        memory_gb: float | None = None,
    ) -> None:
        super().__init__(target, drafter_model, head)
        self.stores_states = not target.split  # the other ranks would have to store theirs
        target.is_compiled = products_are_compiled(target, drafter_model, head)
        self.drafter_arena = new_drafter_arena(drafter_model, target) if drafter_model else None
        self.drafter: Drafter | MtpDrafter | None = None
        if isinstance(drafter_model, MtpModel):
            parallel = drafter_model.config.has_marginals
            self.drafter = (ParallelDrafter if parallel else MtpDrafter)(drafter_model, target)
        elif drafter_model is not None:
            self.drafter = Drafter(drafter_model, target, draft_window)
        # What makes the tables of most drafts: the head, or a block drafter without one.
        self.table_maker: Head | Drafter | None = head
        if head is None and isinstance(self.drafter, Drafter):
            self.table_maker = self.drafter
        if target.device.type == "cuda":
            passes = GRAPH_FACTOR * max(pass_nbytes(target), table_nbytes(self.table_maker, target))
            reserve_memory(target, self.drafter_arena, passes, memory_share, memory_gb)
        if target.split:
            reserve_everywhere(target.arena)
        self.verifier = (LeaderVerifier if target.split else Verifier)(target, drafter_model)
        self.state_class = LeaderState if target.split else State
        self.device = str(target.device)
        self.name = backend_name(target.device)

    @property
    def device_name(self) -> str:
        """The hardware and, on a CPU, the threads of a pass."""
        name = device_name(self.target.device)
        threads = self.target.threads
        return name if threads is None else f"{name}, {threads.number} threads"

    @property
    def captures(self) -> int:
        """Graphs captured so far; the time of an iteration that captures one is no measurement."""
        return self.target.graphs.captures

    def open(self, capacity: int, *, drafts: bool) -> State:
        config = self.drafter_config if drafts else None
        arena = self.drafter_arena if drafts else None
        block = config.scratch_rows if config else 0
        recurrent = self.target.new_recurrent_states()
        return self.state_class(self.target.arena, arena, capacity, block, recurrent)

    def columns(self, capacity: int) -> int:
        arena = self.target.arena
        return arena.page * arena.pages_of(capacity)

    def state_nbytes(self, capacity: int, *, drafts: bool) -> int:
        """Return the size of a sequence's memory, bytes; see `BaseBackend.state_nbytes`.

        Where memory is set aside, target and drafter have equally many positions of it. So the
        target counts the rows of a draft, which only the drafter has, too.
        """
        nbytes = super().state_nbytes(capacity, drafts=drafts)
        config = self.drafter_config if drafts else None
        if config is not None and self.target.arena.reserved_nbytes is not None:
            more = self.columns(capacity + config.scratch_rows) - self.columns(capacity)
            nbytes += more * self.target.column_nbytes
        return nbytes

    @property
    def weights_bytes(self) -> int:
        """Size of the weights of the target and the drafter, bytes."""
        modules = [self.target.model, self.drafter_model, getattr(self.head, "module", None)]
        weights = {p for module in modules if module is not None for p in module.parameters()}
        if isinstance(self.target, DecoderTarget):
            weights |= set(self.target.model.buffers())  # norms of heads
        if self.drafter_model is not None:
            weights |= set(self.drafter_model.own.buffers())  # no parameters
        if self.target.tower is not None:
            weights |= self.target.tower.parameters
        return sum(weight.nbytes for weight in weights)

    @property
    def weights_read(self) -> dict[str, Counter[str]]:
        """Bytes of weights by format that a pass of the target reads, and a draft, by their names.

        With experts a pass reads less: only the experts of its rows.
        """
        found = {"a pass reads": weights_by_format([self.target.model])}
        if (model := self.drafter_model) is not None:
            own, modules = model.own, [model, getattr(self.head, "module", nn.Module())]
            skipped = [own.embed_tokens]
            if own.quantised_lm_head is not None:
                skipped.append(own.lm_head)
            elif own.lm_head is None:
                modules.append(self.target.lm_head)
            found["a draft reads"] = weights_by_format(modules, skipped)
        return found

    def device_report(self) -> DeviceReport:
        device = self.target.device
        facts = device_facts(device)
        for name, formats in self.weights_read.items():
            sizes = [f"{size_text(nbytes)} of {x}" for x, nbytes in formats.most_common()]
            facts[name] = " and ".join(sizes)
        facts["layers of the target"] = self.target.layers_from
        if self.target.threads is not None:
            facts["threads"] = self.target.threads.description
            return DeviceReport(facts=facts, weights_bytes=self.weights_bytes)
        if self.target.spans is not None:
            checked = one_of_each_kind(self.target.devices)
            facts["kernels are checked on"] = ", ".join(map(str, checked))
        arenas = [self.target.arena, *([self.drafter_arena] if self.drafter_arena else [])]
        reserved = [x.reserved_nbytes for x in arenas if x.reserved_nbytes is not None]
        kernels: dict[str, dict[str, str]] = {}
        for size, operations in self._operations().items():
            for name, verdict in operations.verdicts.items():
                kernels.setdefault(name, {})[size] = verdict
        return DeviceReport(
            facts=facts,
            available_bytes=torch.cuda.mem_get_info(device)[1],
            weights_bytes=self.weights_bytes,
            reserved_bytes=sum(reserved) if reserved else None,
            kernels=kernels | {"CUDA graphs": self.target.graphs.verdicts},
        )

    def _operations(self) -> dict[str, Operations]:
        """Return the operations of the target and the drafter, by what they run."""
        target, drafter = self.target.operations, getattr(self.drafter_model, "operations", None)
        found = {self.dtype: target, f"{self.dtype}, drafter": drafter}
        if drafter is target:
            del found[f"{self.dtype}, drafter"]
        return {size: operations for size, operations in found.items() if operations is not None}

    def warm_up(self, max_parallel: int) -> int:
        """Capture the graphs of passes, drafts and tables, the largest first; return how many.

        They share memory, of which later ones then need no more. Tables with other options than the
        default ones, which requests decide, have graphs of their own.
        """
        if not self.target.graphs.is_capturing:
            return 0
        before, arena = self.captures, self.target.state_arena
        try:
            if arena is not None:  # graphs of a smaller arena would be of no use later
                room = torch.cuda.mem_get_info(self.target.device)[0] // 2
                states = room // max(self.target.states_nbytes, 1)
                arena.reserve(min(STATES_EACH * max_parallel, states))
            self._run_all_passes()
            if self.drafter is not None:
                self._run_all_drafts(max_parallel)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            warnings.warn(f"other CUDA graphs are captured when needed: {error}", stacklevel=2)
        return self.captures - before

    def _run_all_passes(self) -> None:
        """Run passes of all numbers of rows that have graphs."""
        with closing(self.open(MAX_ROWS, drafts=False)) as state, torch.inference_mode():
            for rows in reversed(GRAPH_ROWS):
                tree = DraftTree.chain(np.zeros(rows, np.int32))
                self.verifier.forward([(state, tree)], [True])

    def _run_all_drafts(self, max_parallel: int) -> None:
        """Run drafts for up to that many sequences, after few and several new tokens."""
        assert self.drafter is not None
        count = power_of_two(max_parallel)
        while count:
            # Memory may have no room for that many sequences, and room for fewer.
            with suppress(MemoryInUseError), ExitStack() as opened:
                states = [
                    opened.enter_context(closing(self.open(sum(NEW_TOKENS), drafts=True)))
                    for _ in range(count)
                ]
                for tokens in NEW_TOKENS:
                    self.verifier.run([Prefill(state, [0] * tokens, None) for state in states])
                    blocks = self.drafter.draft([(state, 0) for state in states])
                if (maker := self.table_maker) is not None:
                    first: Any = blocks[0]
                    depths = first.depths if isinstance(first, MtpBlock) else len(first.hidden)
                    after = np.arange(1, depths + 1, dtype=np.int32)
                    sampled = [(SamplingConfig(temperature=1.0), after)] * count
                    for noise in (None, Noise.from_positions(sampled)):
                        make_tables(maker, blocks, replace(TABLE, noise=noise))
            count //= 2


def products_are_compiled(target: Target, model: Model | None, head: Head | None) -> bool:
    """Return whether functions of our own compute all products of a pair."""
    if not isinstance(target, CpuTarget) or target.kernels is None:
        return False
    modules = target.model, model, getattr(head, "module", None)
    layers = itertools.chain.from_iterable(x.modules() for x in modules if x is not None)
    return not any(isinstance(layer, LINEARS) for layer in layers)


def load(target: Path, drafter: Path | None, config: LoadConfig) -> CudaBackend:
    check_config(config)
    on_cpu = choose_device(config.device).type == "cpu"
    if config.bits in BITS or (config.bits is None and keeps_bits(target, on_cpu)):
        return load_low_bits(target, drafter, config)
    if config.dtype is not None or not on_cpu or process_count() > 1:
        return load_pair(target, drafter, config)
    try:
        if (dtype := half_dtype(target, config)) is not None:
            return load_pair(target, drafter, replace(config, dtype=dtype, exact=True))
        reason = None
    except InexactError as error:
        reason = str(error)
    # This is not inside `except`, where the error keeps the first target in memory.
    if reason is not None:
        warnings.warn(f"running in float32, because {reason}", stacklevel=2)
    return load_pair(target, drafter, config)


def load_low_bits(target: Path, drafter: Path | None, config: LoadConfig) -> CudaBackend:
    """Load a pair whose target has weights of few bits, or dequantise a folder's.

    Raises an UnsupportedModelError if weights shall be rounded, and exact mode is impossible.
    """
    if (reason := bits_refusal(config)) is None:
        # What products read is rounded anyway. Rounding sums to bfloat16 too takes longer.
        dtype = config.dtype or "float32"
        try:
            return load_pair(target, drafter, replace(config, dtype=dtype, exact=True))
        except InexactError as error:
            if config.exact or config.bits is not None:
                raise
            reason = str(error)
    # This is not inside `except`, where the error keeps the first target in memory.
    if reason:
        warnings.warn(f"weights of few bits are dequantised, because {reason}", stacklevel=3)
    return load(target, drafter, replace(config, bits=UNPACKED_BITS))


def load_pair(target: Path, drafter: Path | None, config: LoadConfig) -> CudaBackend:
    """Load a pair in the dtype of a configuration; without one, in float32 on a CPU.

    On a GPU the default is the checkpoint's dtype, or float16 in place of bfloat16.
    """
    processes = process_count()
    split = processes > 1
    device = choose_device(config.device)
    prepare(device)
    if config.dtype is None and device.type == "cuda":
        config = replace(config, dtype=gpu_dtype(target, device))
    passed = kept_checks(target, drafter, config)
    pack = not config.compile and not split
    model = load_target(target, config, pack=pack, processes=processes, passed=passed)
    # A graph belongs to one device.
    model.graphs.enabled = config.cuda_graphs and config.device_map is None
    if split:
        messages.connect()
        model.graphs.agreements[PASS_NAME] = succeeded_everywhere
        if dist.get_rank() > 0:
            follow(model)
            raise SystemExit(0)
        atexit.register(end, model.graphs)
    if config.compile:
        for layer in model.layers:
            layer.compile()
    return add_drafter(model, drafter, config, passed=passed)


EXAMINED_HEAD_DIMS = (64, 128, 256)


def examine_device(config: LoadConfig) -> DeviceReport:
    """Describe the device, and check the Triton kernels on a GPU, without a model."""
    device = choose_device(config.device)
    if device.type != "cuda":
        return DeviceReport(facts=device_facts(device))
    prepare(device)
    dtype = config.dtype or "bfloat16"
    verdicts: dict[str, dict[str, str]] = {}
    for head_dim in EXAMINED_HEAD_DIMS:
        shapes = examined_shapes(head_dim, BITS)
        operations = load_operations(shapes, device, getattr(torch, dtype))
        for name, verdict in operations.verdicts.items():
            verdicts.setdefault(name, {})[f"{dtype}, heads of {head_dim}"] = verdict
    return DeviceReport(
        facts=device_facts(device),
        available_bytes=torch.cuda.mem_get_info(device)[1],
        kernels=verdicts,
    )


def add_drafter(
    target: Target,
    drafter: Path | None,
    config: LoadConfig,
    *,
    passed: PassedChecks | None = None,
    memory_share: float = FREE_MEMORY_SHARE,
) -> CudaBackend:
    """Return the pair of a target and the drafter of a folder; plain decoding for None.

    Checks that were `passed` do not run.
    """
    model, head = (None, None) if drafter is None else load_drafter(drafter, target, config)
    backend = CudaBackend(
        *(target, model, head),
        draft_window=config.draft_window,
        memory_share=memory_share,
        memory_gb=config.memory_gb,
    )
    if passed is not None:
        backend.passed = passed
    if target.is_exact:
        with inexact_if_refused(target, config):
            backend.check_exact()
    if target.exact_refusal:
        backend.inexact = f"{backend.inexact}; {target.exact_refusal}"
    if drafter is not None:
        backend.check_trees()
    if isinstance(target.processor, Processor):
        if target.is_exact and target.operations is not None and target.processor.family.whole:
            backend.images = "exact mode on a GPU does not run images whose tokens see each other"
        else:
            backend.check_images(target.processor, target.samples)
        if isinstance(backend.images, str):
            warnings.warn(f"{backend.images}; the target takes no images", stacklevel=2)
            target.tower = None
    return backend


def drafter_replacer(pair: CudaBackend) -> Callable[[Path], CudaBackend] | None:
    """Return a function that loads other drafters for a pair's target, each in place of the last.

    None on a GPU, where memory is reserved for a single pair.
    """
    target = pair.target

    def replace_drafter(folder: Path) -> CudaBackend:
        return CudaBackend(target, *load_drafter(folder, target, LoadConfig()))

    return replace_drafter if target.device.type == "cpu" else None


def wrap(model: PreTrainedModel, drafter: Path | None) -> CudaBackend:
    """Return a pair whose target is a loaded model that its owner goes on using.

    Its weights stay as they are. Its attention is replaced, and its layers have hooks, inside
    `Target.attached` alone. It has no CUDA graphs: a graph reads the weights' addresses, and would
    go on with old weights after the owner has moved the model, loaded an adapter or trained it.

    Raises:
        ConfigError: the model's layers are on several devices.
        CheckpointError, UnsupportedModelError: as `load` raises them.
    """
    from treeflash_cuda.hf.model_target import ModelTarget, own_attention

    device = model.get_input_embeddings().weight.device
    if {parameter.device for parameter in model.parameters()} != {device}:
        raise ConfigError("the model is on several devices; load it on one device")
    with own_attention(model), ExitStack() as hooks:
        target = ModelTarget(model, device, pack=False)
        hooks.enter_context(target.hooks)
        if has_tower(model):
            target.tower = GivenFeatures(model)
        add_kernels(target)
        target.choose_passes()
        backend = add_drafter(target, drafter, LoadConfig(), memory_share=WRAPPED_MEMORY_SHARE)
        if target.tower is not None:
            backend.images = NoPictures()
        return backend


NOT_UNDER_TORCHRUN = {
    "adapter": "merge it into the target beforehand",
    "device_map": "remove it",
    "exact": "remove it",
}
"""Settings of one process, and what a user can do instead."""


def check_config(config: LoadConfig, name: str = "cuda") -> None:
    """Raise a ConfigError for settings that this backend lacks, with the name that it has."""
    check_settings(
        config,
        name,
        supported=OPTIONAL,
        draft_bits=BITS,
        kv_bits=(KV_BITS,),
        inexact=("kv_bits", "compile", "device_map"),
    )
    if config.draft_bits in BITS and runs_on_cpu(config) and (reason := products_refusal()):
        raise ConfigError(f"the drafter cannot be rounded to {config.draft_bits} bits: {reason}")
    if config.memory_gb is not None and runs_on_cpu(config):
        raise ConfigError("the cuda backend sets no memory aside on a CPU; remove memory_gb")
    if config.bits in BITS and not runs_on_cpu(config):
        raise ConfigError(
            f"weights cannot be rounded to {config.bits} bits on a GPU; choose a target that is "
            "quantised already, as in GPTQ, AWQ or FP8, or remove bits"
        )
    if config.bits in BITS and (reason := bits_refusal(config)) is not None:
        reason = reason or "they need exact mode on a CPU, without an adapter"
        raise ConfigError(f"weights cannot be rounded to {config.bits} bits: {reason}")
    if config.device_map is not None and config.device is not None:
        raise ConfigError("device_map chooses the devices itself; remove device")
    for name, advice in NOT_UNDER_TORCHRUN.items():
        if getattr(config, name) and process_count() > 1:
            raise ConfigError(f"{name} does not work under torchrun; {advice}")


def check_drafter(config: DrafterShape) -> None:
    """Raise an UnsupportedModelError for a drafter that this backend lacks."""
    refuse_missing_targets(config, "cuda")
