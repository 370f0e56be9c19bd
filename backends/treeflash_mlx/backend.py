"""The MLX backend, and how it loads a target and a drafter."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from treeflash.config import LoadConfig, SamplingConfig
from treeflash.decoding.backend_base import (
    OPTIONAL,
    UNQUANTISED_BITS,
    BaseBackend,
    arrays_nbytes,
    check_settings,
)
from treeflash.decoding.image_processor import Processor, image_samples
from treeflash.decoding.interfaces import DeviceReport, Prefill, SequenceState, TableOptions
from treeflash.decoding.mtp_head import MtpHead
from treeflash.decoding.passed_checks import passed_checks
from treeflash.decoding.probe import ATTEMPTS, LIMITS, relative_difference
from treeflash.decoding.recurrent_head import RecurrentHead
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import StoredTensor
from treeflash.drafters.formats import HEADS
from treeflash.drafters.loading import (
    Layout,
    arrange_block,
    block_tensors,
    mtp_tensors,
    read_layout,
)
from treeflash.drafters.mtp_heads import MtpConfig, refuse_window
from treeflash.errors import UnsupportedModelError
from treeflash_mlx import metal_kernels
from treeflash_mlx.assistant import (
    AssistantDrafter,
    AssistantHead,
    AssistantModel,
    AssistantOutput,
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
from treeflash_mlx.drafter import Drafter, OutputStage
from treeflash_mlx.drafter_model import DrafterModel, OwnVocabulary
from treeflash_mlx.drafter_operations import Float32Bias, Float32Norm, as_module, split_pairs
from treeflash_mlx.exact import check_operations
from treeflash_mlx.heads import TABLE_HEADS, ARHead, TableHead
from treeflash_mlx.metal_kernels.examination import examine
from treeflash_mlx.metal_kernels.products import choose_products
from treeflash_mlx.mtp_head import MtpCache, MtpDrafter, MtpModel, ParallelDrafter
from treeflash_mlx.shared_products import choose_shares, prompt_layers
from treeflash_mlx.state import State
from treeflash_mlx.target import KV_BITS, Target
from treeflash_mlx.verifier import Verifier

Model: TypeAlias = DrafterModel | MtpModel | AssistantModel
Head: TypeAlias = TableHead | MtpHead

BITS = (2, 3, 4, 5, 6, 8)
LEAST_DEFAULT_BITS = 4
"""Drafters take no fewer bits unless asked to: what they lose with fewer was never measured."""
GROUP_SIZE = 64
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
        return State(self.target.new_kv_cache(capacity), drafter)

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
            weights_bytes=self.weights_bytes,
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
        refuse_size(files, limit)
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
    prompts = {} if config.exact else prompt_layers(model.model)
    choose_products(model.model, drafter_model, module)
    choose_shares(prompts)
    window = config.draft_window or DRAFT_WINDOW
    backend = MlxBackend(model, drafter_model, head, draft_window=window)
    # Kernels that are timed at load may win this time and lose the next.
    used = {(k, x) for k, v in metal_kernels.VERDICTS.items() for x in v if v[x].startswith("used")}
    facts = backend.device, sorted(mx.device_info().items()), sorted(used)
    models = target, drafter, adapter
    backend.passed = passed_checks(config.checks, models, config, "treeflash_mlx", facts)
    model.batches = runs_batches(backend)
    if not model.batches:
        logging.getLogger(__name__).warning(
            "mlx-lm computes other logits for %s models in a batch; sequences run one by one",
            model.family,
        )
    if config.exact:
        backend.check_exact()
    if drafter is not None:
        backend.check_trees()
    if isinstance(model.processor, Processor):
        backend.check_images(model.processor, image_samples(model.processor))
        if isinstance(backend.images, str):
            logging.getLogger(__name__).warning("%s; the target takes no images", backend.images)
            model.tower = None
    warn_of_size(backend.weights_bytes)
    if config.wired:
        wire_memory(backend.weights_bytes)
    if not on_cpu:  # a CPU would compute while it should build the rest of the pass
        model.hooks.submit_early([model.layers[i] for i in submitted_layers(len(model.layers))])
        warm_up(backend)
        if summary := metal_kernels.summary():
            logging.getLogger(__name__).info("Metal kernels: %s", summary)
    return backend


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


def choose_bits(asked: int | None, target: nn.Module, *, on_cpu: bool) -> int | None:
    """Return the bits that a drafter is quantised to; None keeps it as it is.

    An iteration on a GPU takes as long as its weights take to be read, so by default a drafter has
    the width of most of the target's weights. On a CPU products of few rows are slower with
    quantised weights.
    """
    if asked is not None:
        return None if asked == UNQUANTISED_BITS else asked
    numbers: Counter[int] = Counter()
    for module in target.modules():
        if (weight := module.get("weight")) is not None:
            bits = getattr(module, "bits", None)
            numbers[bits or UNQUANTISED_BITS] += 8 * weight.nbytes // bits if bits else weight.size
    [(width, _)] = numbers.most_common(1)
    return None if on_cpu or width not in BITS else max(width, LEAST_DEFAULT_BITS)


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


def load_drafter(folder: Path, target: Target, bits: int | None) -> tuple[Model, Head | None]:
    """Read a drafter, check that it fits the target, and quantise it to `bits` if given."""
    target.check_drafting()
    layout = read_layout(
        folder,
        hidden_size=target.embed(mx.array([0])).shape[-1],
        vocab_size=target.vocab_size,
        num_hidden_layers=len(target.layers),
    )
    # Heads that read embeddings take an image's features from the first layer's input.
    ids = layout.config.target_layer_ids
    target.capture((*ids, -1) if layout.format.kind == "rows" else ids)
    if layout.format.kind == "rows":
        rows = load_mtp_head(layout, target, bits)
        if isinstance(rows, AssistantModel):
            return rows, AssistantHead(rows, AssistantOutput(rows, target))
        return rows, None if rows.config.has_marginals else MtpHead(rows, OutputStage(rows, target))
    tensors = block_tensors(layout, read_tensors, dequantise)
    config = tensors.config
    model = DrafterModel(config, OwnVocabulary(tensors.vocabulary, target))
    if offset := config.norm_offset:  # in float32, where adding it rounds nothing
        for name, weight in tensors.backbone.items():
            if name.endswith("norm.weight"):
                tensors.backbone[name] = weight.astype(mx.float32) + offset
    kept = quantised_layers(layout, bits or 0, lambda x: arrange_block(layout, x).backbone)
    fill(model, tensors.backbone, target.dtype, bits, kept)
    if config.head is None:
        return model, None
    head_class = as_module(HEADS[config.head].module)
    module: Any = head_class(config, tensors.head_size, target.vocab_size)
    kept = quantised_layers(layout, bits or 0, lambda x: arrange_block(layout, x).head)
    fill(module, split_pairs(module, tensors.head), target.dtype, bits, kept)
    return model, TABLE_HEADS[module.kind](module, OutputStage(model, target))


def load_mtp_head(layout: Layout, target: Target, bits: int | None) -> MtpModel | AssistantModel:
    """Read a head that drafts depth by depth."""
    tensors, vocabulary = mtp_tensors(layout, read_tensors, dequantise, mx.stack)
    config: MtpConfig = layout.config
    own = OwnVocabulary(vocabulary, target)
    if config.assistant is not None:
        assistant = AssistantModel(config, config.assistant, own, target)
        fill(assistant, tensors, target.dtype, bits)
        return assistant
    model = MtpModel(config, own)
    weights = {
        f"{name}.weight" if name.startswith("layer.mlp.experts.") else name: weight
        for name, weight in tensors.items()
    }
    fill(model, weights, target.dtype, bits, quantised_layers(layout, bits or 0))
    exact = {}  # what stays float32, where adding the offset rounds nothing
    for name, module in model.named_modules():
        if isinstance(module, Float32Norm):
            weight = weights[f"{name}.weight"].astype(mx.float32)
            exact[f"{name}.weight"] = weight + config.norm_offset
        elif isinstance(module, Float32Bias):
            exact[f"{name}.bias"] = weights[f"{name}.bias"].astype(mx.float32)
    model.load_weights(list(exact.items()), strict=False)
    mx.eval(exact)
    return model


PARTS = "weight", "scales", "biases"
"""The tensors of a quantised weight."""


def quantised_layers(
    layout: Layout,
    most: int,
    arrange: Callable[[dict[str, mx.array]], dict[str, mx.array]] = dict,
) -> dict[str, dict[str, mx.array]]:
    """Read the layers of a drafter that its file has quantised to at most some bits, by name.

    Each has a weight, scales and biases, in groups of any size. `arrange` gives each of these the
    rows and the name that the model's weight has.
    """
    found: defaultdict[str, dict[str, mx.array]] = defaultdict(dict)
    tensors = layout.folder.tensors
    kept = {x: name for x, name in layout.names.items() if 0 < tensors[x].bits <= most}
    for part in PARTS:
        arrays: dict[str, mx.array] = {}
        for stored, name in kept.items():
            of_part = stored.removesuffix("weight") + part
            arrays[name] = read_tensors(tensors[stored].path, [of_part])[of_part]
        for name, array in arrange(arrays).items():
            found[name.removesuffix(".weight")][part] = array
    return found


def read_tensors(path: Path, names: Collection[str]) -> dict[str, mx.array]:
    tensors: Any = mx.load(str(path), format="safetensors")  # lazily; the type is the format's
    return {name: tensors[name] for name in names}


def dequantise(path: Path, weights: Mapping[str, StoredTensor]) -> dict[str, mx.array]:
    """Read the numbers of quantised weights lazily: layers that stay as they are need none."""
    found = {}
    for name, weight in weights.items():
        names = [name.removesuffix("weight") + part for part in PARTS]
        words, scales, biases = read_tensors(path, names).values()
        group, wide = weight.shape[-1] // scales.shape[-1], mx.float32
        scales, biases = scales.astype(wide), biases.astype(wide)  # gives the numbers this type
        found[name] = mx.dequantize(words, scales, biases, group, weight.bits)
    return found


def fill(
    module: nn.Module,
    tensors: dict[str, mx.array],
    dtype: mx.Dtype,
    bits: int | None,
    quantised: Mapping[str, Mapping[str, mx.array]] = MappingProxyType({}),
) -> None:
    """Load the weights of a module, and quantise the layers that allow it if `bits` is given.

    The layers that are quantised already, by name, keep their weights, scales and biases. Other
    modules, such as a router, have dequantised ones.
    """
    module.load_weights(list(tensors.items()))
    module.set_dtype(dtype)
    if bits is not None:
        layers = {name for name, child in module.named_modules() if hasattr(child, "to_quantized")}

        def fits(name: str, m: nn.Module) -> bool | dict[str, int]:
            if name not in layers:
                return False
            if name in quantised:
                columns, words = m.weight.shape[-1], quantised[name]["weight"].shape[-1]
                groups = quantised[name]["scales"].shape[-1]
                return {"group_size": columns // groups, "bits": 32 * words // columns}
            return bool(m.weight.shape[-1] % GROUP_SIZE == 0)

        nn.quantize(module, GROUP_SIZE, bits, class_predicate=fits)
        modules = dict(module.named_modules())
        for name in layers & quantised.keys():
            for part, array in quantised[name].items():
                modules[name][part] = array if part == "weight" else array.astype(dtype)
    mx.eval(
        [child.parameters() for child in module.modules()]
    )  # `DrafterModel.own` has parameters too
