"""Loading: the entry point of the PyTorch backend."""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from treeflash.config import GIB, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding.backend_base import (
    OPTIONAL,
    UNQUANTISED_BITS,
    BaseBackend,
    check_settings,
)
from treeflash.decoding.image_processor import Processor
from treeflash.decoding.interfaces import DeviceReport, Prefill
from treeflash.decoding.logit_tables import table_options
from treeflash.decoding.mtp_head import MtpBlock
from treeflash.decoding.passed_checks import PassedChecks, passed_checks
from treeflash.decoding.sampling import Noise
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.config import DrafterShape
from treeflash.drafters.folder import StoredTensor, read_quantised
from treeflash.drafters.loading import Layout, block_tensors, mtp_tensors, read_layout
from treeflash.drafters.mtp_heads import refuse_missing_targets, refuse_window
from treeflash.errors import (
    BackendError,
    ConfigError,
    MemoryInUseError,
    MemoryShortError,
    UnsupportedModelError,
    is_out_of_memory,
)
from treeflash_cuda.cache import KV_BITS, Arena
from treeflash_cuda.cpu import low_bit_loading
from treeflash_cuda.cpu.decoder_facts import DecoderFacts, decoder_facts
from treeflash_cuda.cpu.decoder_target import DecoderTarget
from treeflash_cuda.cpu.decoder_weights import Checkpoint
from treeflash_cuda.cpu.default_dtype import InexactError, gpu_dtype, half_dtype
from treeflash_cuda.cpu.low_bit_linear import LowBitLinear
from treeflash_cuda.cpu.low_bit_loading import (
    UNPACKED_BITS,
    keeps_bits,
    products_refusal,
    rounding,
)
from treeflash_cuda.cpu.plain_config import PlainConfig, target_config
from treeflash_cuda.cpu.threads import cpu_threads
from treeflash_cuda.device import (
    backend_name,
    choose_device,
    device_facts,
    device_name,
    driver_version,
    prepare,
)
from treeflash_cuda.drafter import Block, Drafter, OutputStage
from treeflash_cuda.drafter_model import DrafterModel, load_weights
from treeflash_cuda.drafter_operations import Experts
from treeflash_cuda.exact import LINEARS
from treeflash_cuda.gpu.graphs import GRAPH_ROWS, MAX_ROWS, power_of_two
from treeflash_cuda.gpu.kernels import load_flash_attention
from treeflash_cuda.gpu.parallel import (
    LeaderState,
    LeaderVerifier,
    end,
    follow,
    process_count,
    reserve_everywhere,
    succeeded_everywhere,
)
from treeflash_cuda.heads import HEAD_CLASSES, TABLE_HEADS, TableHead
from treeflash_cuda.images import GivenFeatures, NoPictures, has_tower
from treeflash_cuda.linear import (
    IN_DRAFTER,
    NATIVE,
    Packing,
    QuantisedLinear,
    fuse_linears,
    has_groups,
    pack_linears,
    uses_onednn,
    weights_by_format,
)
from treeflash_cuda.mtp_head import MtpArena, MtpDrafter, MtpHead, MtpModel, ParallelDrafter
from treeflash_cuda.operations import (
    PYTORCH,
    Operations,
    Shapes,
    examined_shapes,
    load_operations,
)
from treeflash_cuda.quantised_weights import BITS
from treeflash_cuda.state import State
from treeflash_cuda.target import PASS_NAME, Target, read_model_config, refuse_stateful
from treeflash_cuda.verifier import Verifier

if TYPE_CHECKING:
    # Modules of `hf` import transformers' models, which takes seconds: only functions that run such
    # a model import them.
    from transformers import PreTrainedModel

    from treeflash_cuda.hf.model_target import ModelTarget

FREE_MEMORY_SHARE = 0.85
"""Share of the memory that models and passes leave free on a GPU, for keys and values. The rest is
for the tokens' choice, the drafter's passes, and what the allocator cannot use."""
WRAPPED_MEMORY_SHARE = 0.2
"""The same beside a model that its owner goes on using."""
GRAPH_FACTOR = 2
"""A pass, and a CUDA graph of it, which keeps its memory."""

MEASURED_TEXTS = 16
"""Texts whose tables are measured: as many as a server decodes at once by default."""
TABLE = table_options(DecodeConfig(), 64)
"""The options of most tables, which are rounded up to these for graphs."""

CPU_DRAFT_BITS = 8
"""Bits of a drafter's weights beside a target with weights of few bits on a CPU."""

STATES_EACH = 2
"""Recurrent states of a sequence at once: a commit writes to another slot."""
STATE_SEQUENCES = 32
"""Sequences whose recurrent states have room beside keys and values."""

NEW_TOKENS = 16, 4, 1
"""New tokens of each sequence after which drafts are captured: their total is rounded up to a power
of four."""

Model: TypeAlias = DrafterModel | MtpModel
Head: TypeAlias = TableHead | MtpHead


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
        if target.device.type == "cuda":
            passes = GRAPH_FACTOR * max(pass_nbytes(target), table_nbytes(head, target))
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

    @property
    def weights_bytes(self) -> int:
        """Size of the weights of the target and the drafter, bytes."""
        modules = [self.target.model, self.drafter_model, getattr(self.head, "module", None)]
        weights = {p for module in modules if module is not None for p in module.parameters()}
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
            skipped = [own.embeddings]
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
            sizes = [f"{nbytes / 2**30:.2f} GiB of {x}" for x, nbytes in formats.most_common()]
            facts[name] = " and ".join(sizes)
        facts["layers of the target"] = self.target.layers_from
        if self.target.threads is not None:
            facts["threads"] = self.target.threads.description
            return DeviceReport(facts=facts, weights_bytes=self.weights_bytes)
        arenas = [self.target.arena, *([self.drafter_arena] if self.drafter_arena else [])]
        kernels: dict[str, dict[str, str]] = {}
        for size, operations in self._operations().items():
            for name, verdict in operations.verdicts.items():
                kernels.setdefault(name, {})[size] = verdict
        return DeviceReport(
            facts=facts,
            available_bytes=torch.cuda.mem_get_info(device)[1],
            weights_bytes=self.weights_bytes,
            reserved_bytes=sum(arena.reserved_nbytes or 0 for arena in arenas) or None,
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
                if self.head is not None:
                    first: Any = blocks[0]
                    depths = first.depths if isinstance(first, MtpBlock) else len(first.hidden)
                    after = np.arange(1, depths + 1, dtype=np.int32)
                    sampled = [(SamplingConfig(temperature=1.0), after)] * count
                    for noise in (None, Noise.from_positions(sampled)):
                        self.head.transitions(blocks, replace(TABLE, noise=noise))
            count //= 2

    def memory_bytes(self) -> int:
        if self.target.device.type == "cuda":
            parts = {part for part, _ in self.target.spans or [(self.target.device, 0)]}
            return sum(torch.cuda.max_memory_allocated(part) for part in parts)
        import resource  # POSIX only, and only needed here

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def products_are_compiled(target: Target, model: Model | None, head: Head | None) -> bool:
    """Return whether functions of our own compute all products of a pair."""
    if not isinstance(target, DecoderTarget) or target.kernels is None:
        return False
    modules = target.model, model, getattr(head, "module", None)
    layers = itertools.chain.from_iterable(x.modules() for x in modules if x is not None)
    return not any(isinstance(layer, LINEARS) for layer in layers)


def new_drafter_arena(model: Model, target: Target) -> Arena:
    """Create an arena for the keys and values of a drafter."""
    config, layers, arena = model.config, len(model.layers), Arena(len(model.layers))
    if isinstance(model, MtpModel):
        arena = MtpArena(layers, config.hidden_size)
    shape = 1, config.num_key_value_heads, 0, config.head_dim
    arena.set_shape(torch.empty(shape, dtype=target.dtype, device=target.device))
    return arena


def reserve_memory(
    target: Target,
    drafter: Arena | None,
    passes: int,
    share: float,
    memory_gb: float | None = None,
) -> None:
    """Let each arena reserve its part of the GPUs' memory: columns for equal positions.

    A GPU has the columns of its layers, and the target's GPU has the drafter's columns too. The
    GPU with the least room for a position decides. Recurrent states of `STATE_SEQUENCES` come
    first, but have at most half.

    Args:
        target: what the memory is for.
        drafter: the drafter's arena; None without a drafter.
        passes: bytes of the target's GPU for passes, drafts, and their graphs.
        share: of the memory that is left, for keys and values.
        memory_gb: GiB of each GPU that take the place of the share.

    Raises a MemoryShortError if so much memory is not left.
    """
    home, whole = target.device, target.arena
    torch.cuda.empty_cache()
    layers = Counter({home: 0})
    for device, count in target.spans or [(home, whole.layers)]:
        layers[device] += count
    left = {x: max(torch.cuda.mem_get_info(x)[0] - passes, 0) for x in layers}
    room = {x: int(share * nbytes) for x, nbytes in left.items()}
    if memory_gb is not None:
        room = dict.fromkeys(layers, int(memory_gb * GIB))
        if (least := min(left.values())) < room[home]:
            raise MemoryShortError(
                f"memory_gb is {memory_gb:g}, but the models leave {least / GIB:.2f} GiB free"
            )
    if target.state_arena is not None:
        states = min(STATES_EACH * STATE_SEQUENCES, room[home] // 2 // target.states_nbytes)
        target.state_arena.reserve(states)
        room[home] -= states * target.states_nbytes
    needed = {x: whole.column_nbytes * n // max(whole.layers, 1) for x, n in layers.items()}
    needed[home] += 0 if drafter is None else drafter.column_nbytes
    fullest = min(layers, key=lambda x: room[x] / max(needed[x], 1))
    for arena in (whole, drafter):
        if arena is not None:
            part = room[fullest] * arena.column_nbytes
            arena.reserved_nbytes = part // max(needed[fullest], 1)


def pass_nbytes(target: Target) -> int:
    """Return the memory that a pass over the largest tree takes, bytes; 0 if it is not one pass."""
    if target.operations is None or target.split or target.spans is not None:
        return 0
    torch.cuda.reset_peak_memory_stats(target.device)
    before = torch.cuda.memory_allocated(target.device)
    try:
        run_tree(target, MAX_ROWS)
    except UnsupportedModelError:  # trees then run with masks; see `Verifier.forward`
        return 0
    return torch.cuda.max_memory_allocated(target.device) - before


@torch.inference_mode()
def table_nbytes(head: Head | None, target: Target) -> int:
    """Return the memory that a head's tables of many sampled texts take, bytes; 0 without one.

    A head that drafts depth by depth computes no more than a pass of the target.
    """
    if head is None or isinstance(head, MtpHead):
        return 0
    config = head.output.config
    outputs = torch.zeros(
        config.depths, config.hidden_size, dtype=target.dtype, device=target.device
    )
    block = Block(0, outputs, outputs, torch.zeros(1, dtype=torch.int32, device=target.device))
    rows = MEASURED_TEXTS * config.depths
    noise = Noise(np.zeros((rows, 2), np.uint32), np.ones(rows, np.float32))
    torch.cuda.reset_peak_memory_stats(target.device)
    before = torch.cuda.memory_allocated(target.device)
    with target.graphs.paused():
        head.transitions([block] * MEASURED_TEXTS, replace(TABLE, noise=noise))
    return torch.cuda.max_memory_allocated(target.device) - before


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
        dtype = config.dtype or ("bfloat16" if uses_onednn(torch.bfloat16) else "float32")
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
        model.graphs.agreements[PASS_NAME] = succeeded_everywhere
        if dist.get_rank() > 0:
            follow(model)
            raise SystemExit(0)
        atexit.register(end, model.graphs)
    if config.compile:
        for layer in model.layers:
            layer.compile()
    backend = add_drafter(model, drafter, config, passed=passed)
    if drafter is not None and model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)  # loading and checking do not count
    return backend


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
    model, head = (None, None) if drafter is None else load_packed_drafter(drafter, target, config)
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
        return CudaBackend(target, *load_packed_drafter(folder, target, LoadConfig()))

    return replace_drafter if target.device.type == "cpu" else None


def load_packed_drafter(
    folder: Path, target: Target, config: LoadConfig
) -> tuple[Model, Head | None]:
    """Load a drafter, packed for the device; the target keeps the outputs that it reads."""
    layout = drafter_layout(folder, target)
    target.capture(layout.config.target_layer_ids)
    bits = choose_draft_bits(config.draft_bits, target)
    model: Model
    head: Head | None
    if layout.format.kind == "rows":
        refuse_window(config)
        model = load_mtp_head(layout, target)
        head = None if model.config.has_marginals else MtpHead(model, OutputStage(model, target))
    else:
        model, head = load_drafter(layout, target)
    model.operations = load_drafter_operations(layout.config, target, bits)
    pack_drafter(model, head, target, bits)
    return model, head


def choose_draft_bits(asked: int | None, target: Target) -> int | None:
    """Return the bits that a drafter's weights are rounded to; None keeps them as they are.

    By default they are rounded where a target's weights have few bits on a CPU: reading the
    drafter's weights would take as long as reading the target's.
    """
    if asked is not None:
        return None if asked == UNQUANTISED_BITS else asked
    keeps_bits = any(isinstance(layer, LowBitLinear) for layer in target.model.modules())
    return CPU_DRAFT_BITS if keeps_bits else None


def pack_drafter(model: Model, head: Head | None, target: Target, bits: int | None) -> None:
    """Pack a drafter, with weights rounded to numbers of `bits` bits if given.

    Then a copy of its output head is rounded, too, unless it is a target's with few bits. Logits of
    some tokens alone, as of a shortlist, are computed from the original output head.
    """
    modules: set[Any] = {model, getattr(head, "module", model)}
    packing, on_cpu = NATIVE, target.device.type == "cpu"
    if bits is not None:
        product = (model.operations or PYTORCH).quantised_linear
        on_gpu = Packing(functools.partial(QuantisedLinear, product, bits), has_groups)
        packing = rounding(bits) if on_cpu else on_gpu
        weight: Any = model.own.lm_head
        bias = None
        if weight is None:
            weight, bias = target.lm_head_weight, getattr(target.lm_head, "bias", None)
        if isinstance(weight, Tensor) and packing.fits(weight):
            model.own.quantised_lm_head = packing.pack(weight, bias)
    if on_cpu or bits is None:
        fuse_linears(model, IN_DRAFTER, packing)
    for module in modules:
        pack_linears(module, packing)
        pack_linears(module)  # layers that cannot be rounded
        if isinstance(target, DecoderTarget) and target.kernels is not None:
            from treeflash_cuda.cpu.drafter_norms import use_kernels  # needs llvmlite

            use_kernels(module, target.kernels, target.dtype)
    if model.operations is not None:
        from treeflash_cuda.hf.fused_layers import fuse_layers

        fuse_layers(model, model.operations, target.dtype)
        for part in model.modules():
            if isinstance(part, Experts):
                part.operations = model.operations


@contextmanager
def inexact_if_refused(target: Target, config: LoadConfig) -> Iterator[None]:
    """Go on without exact mode where it is refused, unless the configuration asks for it."""
    try:
        yield
    except UnsupportedModelError as error:
        if config.exact:
            raise InexactError(str(error)) from error
        target.make_inexact(str(error))


def wrap(model: PreTrainedModel, drafter: Path | None) -> CudaBackend:
    """Return a pair whose target is a loaded model that its owner goes on using.

    Its weights stay as they are. Its attention is replaced, and its layers have hooks, inside
    `Target.attached` alone. It has neither CUDA graphs nor fused layers: a graph reads the weights'
    addresses, and would go on with old weights after the owner has moved the model, loaded an
    adapter or trained it.

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
        choose_passes(target)
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
    if config.bits in BITS and (reason := bits_refusal(config)) is not None:
        reason = reason or "they need exact mode on a CPU, without an adapter"
        raise ConfigError(f"weights cannot be rounded to {config.bits} bits: {reason}")
    if config.device_map is not None and config.device is not None:
        raise ConfigError("device_map chooses the devices itself; remove device")
    for name, advice in NOT_UNDER_TORCHRUN.items():
        if getattr(config, name) and process_count() > 1:
            raise ConfigError(f"{name} does not work under torchrun; {advice}")


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
        torch.__config__.show(),  # also the instructions that are used
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
    )
    adapter = None if config.adapter is None else Path(config.adapter)
    models = target, drafter, adapter
    return passed_checks(config.checks, models, config, "treeflash_cuda", facts)


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
    choose_passes(model)
    if pack and model.operations is not None:
        fuse_parts(model)
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
    own = own_layers(folder, config, settings, device, pack=pack, processes=processes)
    if isinstance(own, OwnLayers):
        assert dtype is not None
        return DecoderTarget.load(own.checkpoint, config, own.facts, dtype, settings)
    from treeflash_cuda.hf.model_target import ModelTarget

    if isinstance(config, PlainConfig):
        config = read_model_config(folder)
    model = ModelTarget.load(
        folder, config, device, dtype, settings, pack=pack, processes=processes
    )
    model.layers_from = f"transformers, because {own}"
    add_kernels(model)
    return model


@dataclass(frozen=True, eq=False)
class OwnLayers:
    """What a target with layers of our own is made of."""

    checkpoint: Checkpoint
    facts: DecoderFacts


def own_layers(
    folder: Path,
    config: Any,  # see `target_config`
    settings: LoadConfig,
    device: torch.device,
    *,
    pack: bool,  # see `ModelTarget`
    processes: int,
) -> OwnLayers | str:
    """Return what a target is made of that has layers of our own; or why it has none, as a clause.

    This alone decides which targets are models of transformers.
    """
    reasons = {
        "treeflash's layers run on a CPU alone": device.type != "cpu",
        "several devices have its layers": settings.device_map is not None or processes > 1,
        "its layers are compiled": settings.compile,
        "an adapter is merged into it": settings.adapter is not None,
        "training reads its layers": not pack,
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        return reason
    facts = decoder_facts(config)
    if isinstance(facts, str):
        return facts
    checkpoint = Checkpoint(folder, config.to_dict())
    return checkpoint.foreign or OwnLayers(checkpoint, facts)


def fuse_parts(target: Any) -> None:
    """Let parts of the layers of a `ModelTarget` call its operations."""
    from treeflash_cuda.hf.experts import fuse_experts
    from treeflash_cuda.hf.fused_layers import fuse_layers, fuse_residuals, fuse_rotation
    from treeflash_cuda.hf.model_target import CHECKED_TOKENS

    model, run = target.model, functools.partial(run_tree, target, CHECKED_TOKENS)
    fuse_layers(model, target.operations, target.dtype)
    fuse_experts(model, target.operations, target.dtype)
    fuse_rotation(model, run)
    fuse_residuals(target.layers, getattr(model.get_decoder(), "norm", None), run)


@torch.inference_mode()
def run_tree(target: Any, nodes: int) -> None:
    """Run a tree through a `ModelTarget`, without a graph; keys, values and states are dropped."""
    from treeflash_cuda.hf.row_pass import RowPass

    arena = copy(target.arena)
    arena.slabs = []  # the target's own memory is allocated later
    state = State(arena, None, nodes, recurrent=target.new_recurrent_states())
    tokens = np.arange(nodes, dtype=np.int32) % target.vocab_size
    with target.graphs.paused():
        RowPass(target).run([(state, DraftTree.chain(tokens, np.zeros(nodes)))], [True])


def choose_passes(target: Any) -> None:
    """Let trees of a `ModelTarget` run with masks if a layer cannot run in the pass over rows.

    A tree finds it out. Raises an UnsupportedModelError in exact mode, because the other passes
    have other bits. Without operations all passes have masks.
    """
    operations = target.operations
    if operations is None or not operations.runs_trees or not target.reads_cache:
        return
    from treeflash_cuda.hf.model_target import CHECKED_TOKENS

    try:
        run_tree(target, CHECKED_TOKENS)
    except UnsupportedModelError as error:
        if target.is_exact:
            raise
        target.passes.has_row_pass = False
        warnings.warn(f"draft trees run without CUDA graphs: {error}", stacklevel=2)


def add_kernels(target: ModelTarget) -> None:
    """Let a target use the kernels of its devices for prompts and trees."""
    target.operations = load_target_operations(target)
    if target.softcap is not None or target.has_sinks:
        return
    for part, _ in target.spans or [(target.device, len(target.layers))]:
        attend, reason = load_flash_attention(part, target.dtype, target_shapes(target))
        target.prompt_attention = attend
        if attend is None:
            break
    if reason:
        warnings.warn(f"prompts will be slow: {reason}", stacklevel=3)


def load_target_operations(target: ModelTarget) -> Operations | None:
    """Load the target's operations on a GPU; None on a CPU, which uses masks."""
    if target.device.type != "cuda":
        return None
    return load_kernels(target_shapes(target), target)


def load_drafter_operations(
    config: DrafterShape, target: Target, bits: int | None = None
) -> Operations | None:
    """Load the drafter's operations: the target's, unless it has other shapes."""
    shapes = Shapes(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        sinks=getattr(config, "attention_sinks", False),
        experts=getattr(config, "experts", None) is not None,
        draft_bits=() if bits is None else (bits,),
    )
    if target.device.type != "cuda" or shapes == target_shapes(target):
        return target.operations
    return load_kernels(shapes, target, "in the drafter ")


def load_kernels(shapes: Shapes, target: Target, place: str = "") -> Operations:
    """Load operations on a target's GPU, with a warning of those that have no kernel."""
    operations = load_operations(shapes, target.device, target.dtype)
    for line in operations.fallbacks:
        warnings.warn(place + line, stacklevel=2)
    return operations


def target_shapes(target: Target) -> Shapes:
    """Return the sizes of a target that kernels depend on."""
    from treeflash_cuda.hf.experts import has_experts

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
        experts=has_experts(target.model),
        recurrent=() if arena is None else arena.matrix_shapes,
        convolutions=() if arena is None else arena.tail_shapes,
    )


def check_drafter(config: DrafterShape) -> None:
    """Raise an UnsupportedModelError for a drafter that this backend lacks."""
    refuse_missing_targets(config, "cuda")


def drafter_layout(folder: Path, target: Target) -> Layout:
    """Check that the drafter of a folder belongs to the target, before its weights are read."""
    vocab_size, hidden_size = target.embeddings.shape
    return read_layout(
        folder,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_hidden_layers=len(target.layers),
    )


def load_mtp_head(layout: Layout, target: Target) -> MtpModel:
    """Read a head that drafts depth by depth."""
    check_drafter(layout.config)
    tensors = mtp_tensors(layout, read_tensors, dequantise, torch.stack)
    return load_weights(MtpModel, layout.config, *tensors, target)


def read_tensors(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def dequantise(path: Path, weights: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x) for name, x in read_quantised(path, weights).items()}


def load_drafter(layout: Layout, target: Target) -> tuple[DrafterModel, TableHead | None]:
    """Read a block drafter."""
    tensors = block_tensors(layout, read_tensors, dequantise)
    config = tensors.config
    model = load_weights(DrafterModel, config, tensors.backbone, tensors.vocabulary, target)
    if config.head is None:
        return model, None
    with torch.device("meta"):
        module: Any = HEAD_CLASSES[config.head](config, tensors.head_size, target.vocab_size)
    module.load_state_dict(tensors.head, assign=True)
    module = module.to(target.device, target.dtype).eval()
    return model, TABLE_HEADS[module.kind](module, OutputStage(model, target))
