"""The MLX backend, and how it loads a target and a drafter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from treeflash.config import LoadConfig, SamplingConfig
from treeflash.decoding.backend_base import (
    OPTIONAL,
    BaseBackend,
    arrays_nbytes,
    check_settings,
)
from treeflash.decoding.image_processor import Processor, image_samples
from treeflash.decoding.interfaces import DeviceReport, Prefill, SequenceState, TableOptions
from treeflash.decoding.passed_checks import passed_checks
from treeflash.decoding.probe import ATTEMPTS, LIMITS, relative_difference
from treeflash.decoding.recurrent_head import RecurrentHead
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.mtp_heads import MtpConfig, refuse_window
from treeflash.errors import UnsupportedModelError
from treeflash_mlx import metal_kernels
from treeflash_mlx.assistant import (
    AssistantDrafter,
    AssistantModel,
)
from treeflash_mlx.cache import KVCache, allocated_columns, size_class
from treeflash_mlx.device import (
    available_bytes,
    choose_device,
    device_facts,
    limit_cache,
    memory_limit,
    refuse_size,
    warn_of_size,
    warn_of_tf32,
    wire_memory,
)
from treeflash_mlx.drafter import Drafter
from treeflash_mlx.drafter_loading import BITS, Head, Model, choose_bits, load_drafter
from treeflash_mlx.exact import check_operations
from treeflash_mlx.heads import ARHead
from treeflash_mlx.memory import MEMORY
from treeflash_mlx.metal_kernels.examination import examine
from treeflash_mlx.metal_kernels.products import choose_products
from treeflash_mlx.mtp_head import MtpCache, MtpDrafter, MtpModel, ParallelDrafter
from treeflash_mlx.shared_products import choose_shares, prompt_layers
from treeflash_mlx.state import State
from treeflash_mlx.target import KV_BITS, Target
from treeflash_mlx.verifier import Verifier

WARM_NODES = 24
DRAFT_WINDOW = 4096
"""Latest positions that a block drafter sees by default: drafts of the default pair stay as good,
and an iteration reads less memory after long texts. The cache keeps earlier positions all the same:
a prompt that shares only a beginning with a text goes on from there, and sees what came before."""
FIRST_GAP, LAST_GAPS = 2, 4
"""Layers between the first two times that a forward pass submits work to the device, and how often
it submits at least. The device would wait for Python after the first layer alone; each submission
costs time, so gaps double."""


class MlxBackend(BaseBackend):
    """`treeflash.decoding.interfaces.Backend` in MLX; see `LoadConfig.draft_window`."""

    name = "mlx"
    stores_states = True

    def __init__(
        self,
        target: Target,
        drafter_model: Model | None,
        head: Head | None,
        *,
        draft_window: int | None = None,
    ) -> None:
        super().__init__(target, drafter_model, head)
        self.verifier = Verifier(target, drafter_model)
        self.drafter: Drafter | MtpDrafter | None = None
        if isinstance(drafter_model, AssistantModel):
            self.drafter = AssistantDrafter(drafter_model, target)
        elif isinstance(drafter_model, MtpModel):
            parallel = drafter_model.config.has_marginals
            self.drafter = (ParallelDrafter if parallel else MtpDrafter)(drafter_model, target)
        elif drafter_model is not None:
            self.drafter = Drafter(drafter_model, target, draft_window)
        self.device = "cpu" if mx.default_device().type == mx.cpu else "gpu"
        self.device_name = str(mx.device_info()["device_name"])

    def open(self, capacity: int, *, drafts: bool) -> State:
        drafter = None
        if drafts and (config := self.drafter_config):
            cache_class = MtpCache if isinstance(config, MtpConfig) else KVCache
            layers = config.num_hidden_layers + cache_class.layers_without_keys
            drafter = cache_class(layers, capacity + config.scratch_rows)
        size = partial(self.state_nbytes, drafts=drafts)
        return State(self.target.new_kv_cache(capacity), drafter, size)

    def columns(self, capacity: int) -> int:
        """Return a lone sequence's columns; sequences that run together have the largest number."""
        return allocated_columns(capacity)

    def states_nbytes(self, states: Sequence[tuple[int, bool]]) -> int:
        """Return the bytes of states that run together: `state_nbytes`, and the rows' padding."""
        nbytes = sum(self.state_nbytes(capacity, drafts=drafts) for capacity, drafts in states)
        if not self.target.batches:
            return nbytes
        classes: dict[int, list[int]] = {}
        for capacity, _ in states:
            columns = allocated_columns(capacity)
            classes.setdefault(size_class(columns), []).append(columns)
        padding = sum(len(rows) * max(rows) - sum(rows) for rows in classes.values())
        return nbytes + padding * int(self.target.column_nbytes)

    def check_exact(self) -> None:
        check_operations(self.target)
        super().check_exact()

    def check_trees(self) -> None:
        self.target.check_trees()
        super().check_trees()
        self.target.trees_are_right = True

    @property
    def weights_bytes(self) -> int:
        """Size of the weights of the target and the drafter, bytes."""
        modules = [self.target.model, self.drafter_model, getattr(self.head, "module", None)]
        own = getattr(self.drafter_model, "own", None)  # tensors beside its parameters
        arrays = [x for m in (*modules, own) if m for _, x in tree_flatten(m.parameters())]
        if self.target.tower is not None:
            arrays += self.target.tower.arrays
        return arrays_nbytes(arrays)

    def device_report(self) -> DeviceReport:
        return DeviceReport(
            facts=device_facts(),
            available_bytes=available_bytes(),
            weights_bytes=(weights := self.weights_bytes),
            others_bytes=max(MEMORY.models_nbytes - weights, 0),
            batches=self.target.batches,
            kernels=metal_kernels.VERDICTS,
            messages=metal_kernels.MESSAGES,
        )


def load(target: Path, drafter: Path | None, config: LoadConfig) -> MlxBackend:
    """Load a pair as `Loader` describes.

    MLX has one default device for the whole process, and `config.device` sets it.
    """
    check_config(config)
    on_cpu = choose_device(config.device)
    limit_cache()
    if not config.force and (limit := memory_limit()) is not None:
        drafts = () if drafter is None else drafter.glob("*.safetensors")
        files = {*target.glob("model*.safetensors"), *drafts}  # the drafter may be in it
        refuse_size(files, limit, MEMORY.nbytes)
    dtype = getattr(mx, config.dtype) if config.dtype else (mx.float32 if on_cpu else None)
    adapter = Path(config.adapter) if config.adapter else None
    model = Target(target, dtype, config.kv_bits, adapter)
    if not config.images:
        model.processor = "it was loaded without its vision tower"
    elif adapter is not None:
        model.processor = "they do not work with an adapter"
    else:
        model.load_images(target)
    if not on_cpu and model.dtype == mx.float32:
        warn_of_tf32()

    bits = choose_bits(config.draft_bits, model.model, on_cpu=on_cpu)
    drafter_model, head = (None, None) if drafter is None else load_drafter(drafter, model, bits)
    if isinstance(drafter_model, MtpModel | AssistantModel):
        refuse_window(config)
    module = head.module if isinstance(head, ARHead | RecurrentHead) else None
    if config.exact and metal_kernels.runs_matrix_kernels():
        model.use_exact_kernels()
        model.processor = "exact mode on Metal takes no images"
    prompts = {} if config.exact else prompt_layers(model.model, model.lm_head)
    choose_products(model.model, drafter_model, module)
    choose_shares(prompts)
    window = config.draft_window or DRAFT_WINDOW
    backend = MlxBackend(model, drafter_model, head, draft_window=window)
    MEMORY.add_model(backend, backend.weights_bytes)
    check_pair(backend, (target, drafter, adapter), config)
    warn_of_size(backend.weights_bytes)
    if config.wired:
        wire_memory(MEMORY.models_nbytes)
    if not on_cpu:  # a CPU would compute while it should build the rest of the pass
        model.hooks.submit_early([model.layers[i] for i in submitted_layers(len(model.layers))])
        warm_up(backend)
        if summary := metal_kernels.summary():
            logging.getLogger(__name__).info("Metal kernels: %s", summary)
    return backend


def check_pair(
    backend: MlxBackend, models: tuple[Path, Path | None, Path | None], config: LoadConfig
) -> None:
    """Check what a loaded pair computes, and turn batches or images off if they are wrong.

    `models` are the folders of the target, the drafter and the adapter.
    """
    target, logger = backend.target, logging.getLogger(__name__)
    # Kernels that are timed at load may win this time and lose the next.
    used = {(k, x) for k, v in metal_kernels.VERDICTS.items() for x in v if v[x].startswith("used")}
    facts = backend.device, sorted(mx.device_info().items()), sorted(used)
    backend.passed = passed_checks(config.checks, models, config, "treeflash_mlx", facts)
    target.batches = runs_batches(backend)
    if not target.batches:
        logger.warning(
            "mlx-lm computes other logits for %s models in a batch; sequences run one by one",
            target.family,
        )
    if config.exact:
        backend.check_exact()
    if backend.drafter is not None:
        backend.check_trees()
    if isinstance(target.processor, Processor):
        backend.check_images(target.processor, image_samples(target.processor))
        if isinstance(backend.images, str):
            logger.warning("%s; the target takes no images", backend.images)
            target.tower = None


def submitted_layers(count: int) -> list[int]:
    """List the layers of `count` after which a forward pass is submitted so far."""
    chosen, gap = [0], FIRST_GAP
    while chosen[-1] + gap < count:
        chosen.append(chosen[-1] + gap)
        gap = min(2 * gap, -(-count // LAST_GAPS))
    return chosen


def examine_device(config: LoadConfig) -> DeviceReport:
    """Describe the device, and check and time every kernel there anew, without a model."""
    choose_device(config.device)
    limit_cache()
    examine()
    return DeviceReport(
        facts=device_facts(),
        available_bytes=available_bytes(),
        kernels=metal_kernels.VERDICTS,
        messages=metal_kernels.MESSAGES,
    )


def warm_up(backend: MlxBackend) -> None:
    """Run everything that an answer needs once, so that Metal compiles its kernels now.

    Without a drafter that is a tree too, which has copies of the text.
    """
    parents = ((np.arange(WARM_NODES) - 1) // 2).astype(np.int32)
    tree = DraftTree.from_parents(np.zeros(WARM_NODES, np.int32), parents)
    options = TableOptions(k=16, m=16, shortlist=1024, rows=WARM_NODES)
    drafter, has_trees = backend.drafter, True
    try:
        backend.check_trees()
    except UnsupportedModelError:
        has_trees = False  # said where trees are asked for
    with SequenceSession(backend, drafts=drafter is not None, capacity=256) as sequence:
        for sampling in (SamplingConfig(), SamplingConfig(temperature=1.0, top_p=0.9)):
            root = sequence.extend([0] * WARM_NODES, sampling)
            sequence.verify(DraftTree.root_only(root), sampling)
            if drafter is not None:
                blocks = [sequence.draft(root)]
                if backend.head is None:
                    drafter.marginals(blocks, options)
                else:
                    backend.head.transitions(blocks, options)
            if has_trees:
                sequence.verify(tree, sampling)
            sequence.commit(np.zeros(1, np.int32))


def check_config(config: LoadConfig) -> None:
    check_settings(
        config,
        "mlx",
        supported=OPTIONAL,
        draft_bits=BITS,
        kv_bits=KV_BITS,
        inexact=("kv_bits",),
    )


def runs_batches(backend: MlxBackend) -> bool:
    """Return whether sequences of different lengths have the same logits in one pass as alone.

    Some models of mlx-lm take the mask or the offset of only one sequence; their sequences are run
    one by one. As in `check_trees`, differences are relative to the difference that another context
    makes, and in half precision a mixture of experts may route a near-tie either way, so several
    contexts may be tried. Rounding may hide a wrong position there, but not the difference that
    another neighbour makes. This is also the first call of the model, and some models make arrays
    in it that only the same thread can evaluate. Queries that are scaled by column differ only
    after thousands of tokens.
    """
    rng = np.random.default_rng(0)
    try:
        attempts = range(ATTEMPTS[backend.dtype])
        equal = any(batch_difference(backend, rng) <= LIMITS[backend.dtype] for _ in attempts)
        equal = equal and neighbour_difference(backend, rng) <= LIMITS["float32"]
    except (AttributeError, IndexError, TypeError, ValueError):
        return False
    return equal and not backend.target.scales_by_column


@contextmanager
def random_sequences(
    backend: MlxBackend, rng: np.random.Generator, *lengths: int
) -> Iterator[list[tuple[SequenceState, DraftTree]]]:
    """Yield sequences of random tokens, and the same root for all; they may share passes."""
    tree = DraftTree.root_only(int(rng.integers(backend.vocab_size)))
    batches, backend.target.batches = backend.target.batches, True
    sequences = [SequenceSession(backend, capacity=32) for _ in lengths]
    try:
        for sequence, length in zip(sequences, lengths, strict=True):
            prompt = rng.integers(0, backend.vocab_size, length).tolist()
            backend.verifier.run([Prefill(sequence.state, prompt, None)])
        yield [(sequence.state, tree) for sequence in sequences]
    finally:
        backend.target.batches = batches
        for sequence in sequences:
            sequence.close()


def batch_difference(backend: MlxBackend, rng: np.random.Generator) -> float:
    """Compare the difference that a pass of two sequences makes with what another context makes."""
    with random_sequences(backend, rng, 2, 12) as sequences:
        alone = [backend.verifier.logits([x]).logits[0][0] for x in sequences]
        together = [x[0] for x in backend.verifier.logits(sequences).logits]
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN is not an error yet
        differences = [relative_difference(*pair) for pair in zip(together, alone, strict=True)]
        return float(np.max(differences)) / relative_difference(*alone)  # `max` may pass over NaN


def neighbour_difference(backend: MlxBackend, rng: np.random.Generator) -> float:
    """Compare the differences that another neighbour and another context make to a sequence.

    The neighbours have different lengths, and the passes the same shapes, so that they round alike.
    """
    with random_sequences(backend, rng, 2, 7, 12) as (*neighbours, last):
        logits = [np.stack(backend.verifier.logits([x, last]).logits)[:, 0] for x in neighbours]
    (_, before), (context, after) = logits
    return relative_difference(before, after) / relative_difference(context, after)
