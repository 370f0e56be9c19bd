"""The MLX backend, and how it loads a target and a drafter."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx import nn

from treeflash.config import LoadConfig
from treeflash.decoding.backend_base import BaseBackend, load_pair
from treeflash.decoding.interfaces import Prefill
from treeflash.decoding.probe import TOLERANCES
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.loading import load_tensors
from treeflash.drafters.row_heads import (
    RowConfig,
    RowFormat,
    find_row_format,
    load_row_tensors,
    refuse_window,
)
from treeflash.errors import BackendError, ConfigError
from treeflash_mlx import TF32_MAY_BE_ON
from treeflash_mlx.cache import KVCache, allocated_columns, release_freed_memory
from treeflash_mlx.drafter import Drafter
from treeflash_mlx.drafter_model import DrafterModel, OwnVocabulary
from treeflash_mlx.heads import HEADS, ARHead, RecurrentCell, RecurrentHead
from treeflash_mlx.linear import split_pairs
from treeflash_mlx.row_head import Norm, RowCache, RowDrafter, RowHead, RowModel
from treeflash_mlx.state import State
from treeflash_mlx.target import KV_BITS, Target
from treeflash_mlx.verifier import Verifier

Model: TypeAlias = DrafterModel | RowModel
Head: TypeAlias = ARHead | RecurrentHead | RowHead

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZE = 64
MAX_SUBMISSIONS = 4
"""Times that a forward pass submits work to the device, at most."""


class MlxBackend(BaseBackend):
    """`treeflash.decoding.interfaces.Backend` in MLX; see `LoadConfig.draft_window`."""

    name = "mlx"

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
        self.drafter: Drafter | RowDrafter | None = None
        if isinstance(drafter_model, RowModel):
            self.drafter = RowDrafter(drafter_model, target)
        elif drafter_model is not None:
            self.drafter = Drafter(drafter_model, target, draft_window)
        self.device = "cpu" if mx.default_device().type == mx.cpu else "gpu"
        self.device_name = str(mx.device_info()["device_name"])

    def open(self, capacity: int, *, drafts: bool) -> State:
        drafter = None
        if drafts and (config := self.drafter_config):
            cache_class = RowCache if isinstance(config, RowConfig) else KVCache
            drafter = cache_class(config.num_hidden_layers, capacity + config.scratch_rows)
        return State(self.target.new_kv_cache(capacity), drafter)

    def columns(self, capacity: int) -> int:
        """Columns of a sequence alone; sequences that run together have as many as the largest."""
        return allocated_columns(capacity)

    def check_trees(self) -> None:
        self.target.check_trees()
        super().check_trees()

    def memory_bytes(self) -> int:
        return mx.get_peak_memory()


def load(target: Path, drafter: Path | None, config: LoadConfig) -> MlxBackend:
    """Load a pair as `Loader` describes.

    MLX has one default device for the whole process, and `config.device` sets it.
    """
    check_config(config)
    on_cpu = choose_device(config.device)
    dtype = getattr(mx, config.dtype) if config.dtype else (mx.float32 if on_cpu else None)
    adapter = Path(config.adapter) if config.adapter else None
    model = Target(target, dtype, config.kv_bits, adapter)
    if not on_cpu and model.dtype == mx.float32:
        warn_of_tf32()

    def make_backend(drafter_model: Model | None, head: Head | None) -> MlxBackend:
        if isinstance(drafter_model, RowModel):
            refuse_window(config)
        backend = MlxBackend(model, drafter_model, head, draft_window=config.draft_window)
        model.batches = runs_batches(backend)
        return backend

    backend = load_pair(
        make_backend, drafter, lambda folder: load_drafter(folder, model, config.draft_bits)
    )
    if not on_cpu:  # a CPU would compute while it should build the rest of the pass
        model.hooks.submit_early(model.layers[:: -(-len(model.layers) // MAX_SUBMISSIONS)])
    release_freed_memory()
    return backend


def check_config(config: LoadConfig) -> None:
    """Raise a ConfigError for settings that this backend lacks."""
    for option in ("compile", "device_map", "exact"):
        if getattr(config, option):
            raise ConfigError(f"{option} is supported only by the cuda backend")
    if config.kv_bits not in (None, *KV_BITS):
        raise ConfigError(
            f"kv_bits must be one of {KV_BITS} on the mlx backend, got {config.kv_bits}"
        )
    if config.draft_bits not in (None, *BITS):
        raise ConfigError(
            f"draft_bits must be one of {BITS} on the mlx backend, got {config.draft_bits}"
        )


def choose_device(name: str | None) -> bool:
    """Use the device of that name, or MLX's default; returns whether it is the CPU.

    Raises:
        BackendError: there is no such device.
    """
    if name not in (None, "cpu", "gpu"):
        raise BackendError(f"the mlx backend runs on gpu or cpu, not on {name!r}")
    if name == "gpu" and not (mx.metal.is_available() or mx.cuda.is_available()):
        raise BackendError("this MLX has no GPU; use device cpu")
    if name is not None:
        mx.set_default_device(mx.Device(getattr(mx, name)))
    if mx.metal.is_available() and mx.default_device().type == mx.gpu:
        # As in mlx-lm: keep the weights resident, as far as the system recommends.
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    return mx.default_device().type == mx.cpu


def warn_of_tf32() -> None:
    """Warn if a GPU may round float32 products to TF32."""
    if TF32_MAY_BE_ON:
        warnings.warn(
            "MLX was imported before treeflash_mlx and may compute in TF32, where drafting can "
            "change tokens; set MLX_ENABLE_TF32=0 in the environment",
            stacklevel=3,
        )


def runs_batches(backend: MlxBackend) -> bool:
    """Whether sequences of different lengths have the same logits in one pass as alone.

    Some models of mlx-lm take the mask or the offset of only one sequence; their sequences are run
    one by one. This is also the first call of the model, and some models make arrays in it that
    only the same thread can evaluate.
    """
    sequences = [SequenceSession(backend, capacity=32) for _ in range(2)]
    states, tree = [sequence.state for sequence in sequences], DraftTree.root_only(0)
    prompts = [0, 1], [i % 3 for i in range(12)]
    try:
        for state, prompt in zip(states, prompts, strict=True):
            backend.verifier.run([Prefill(state, prompt, None)])
        alone = [sequence.logits(tree) for sequence in sequences]
        backend.target.batches = True
        together = backend.verifier.logits([(state, tree) for state in states])
    except (AttributeError, IndexError, TypeError, ValueError):
        return False
    finally:
        for sequence in sequences:
            sequence.close()
    pairs = zip(together, alone, strict=True)
    with np.errstate(invalid="ignore"):  # NaN is not an error yet
        errors = [np.sqrt(np.mean((x - y) ** 2)) / y.std() for x, y in pairs]
    return bool(np.max(errors) <= TOLERANCES[backend.dtype])


def load_drafter(folder: Path, target: Target, bits: int | None) -> tuple[Model, Head | None]:
    """Read a drafter, check that it fits the target, and quantise it to `bits` if given."""
    target.check_drafting()
    if (row_format := find_row_format(folder)) is not None:
        rows = load_row_head(folder, row_format, target, bits)
        return rows, RowHead(rows, target)
    tensors = load_tensors(
        folder,
        read_file,
        hidden_size=target.embed(mx.array([0])).shape[-1],
        vocab_size=target.vocab_size,
        num_hidden_layers=len(target.layers),
    )
    config = tensors.config
    target.capture(config.target_layer_ids)
    model = DrafterModel(config, OwnVocabulary(tensors.vocabulary, target))
    _fill(model, tensors.backbone, target.dtype, bits)
    if config.head is None:
        return model, None
    module = HEADS[config.head](config, tensors.head_size, target.vocab_size)
    _fill(module, split_pairs(module, tensors.head), target.dtype, bits)
    if isinstance(module, RecurrentCell):
        return model, RecurrentHead(module, model, target)
    return model, ARHead(module, model, target)


def load_row_head(
    folder: Path, row_format: RowFormat, target: Target, bits: int | None
) -> RowModel:
    """Read the row head of a folder; see `load_row_tensors`."""

    def read(path: Path, names: Collection[str]) -> dict[str, mx.array]:
        tensors = read_file(path)  # lazily
        return {name: tensors[name] for name in names}

    tensors = load_row_tensors(
        folder,
        row_format,
        read,
        lambda parts: mx.stack(list(parts)),
        hidden_size=target.embed(mx.array([0])).shape[-1],
        vocab_size=target.vocab_size,
        num_hidden_layers=len(target.layers),
    )
    config = tensors.config
    target.capture(config.target_layer_ids)
    model = RowModel(config, OwnVocabulary(tensors.vocabulary, target))
    weights = {
        f"{name}.weight" if name.startswith("layer.mlp.experts.") else name: weight
        for name, weight in tensors.weights.items()
    }
    _fill(model, weights, target.dtype, bits)
    for name, module in model.named_modules():
        if isinstance(module, Norm):  # in float32, where adding the offset rounds nothing
            weight = weights[f"{name}.weight"].astype(mx.float32) + config.norm_offset
            module.weight = weight
            mx.eval(weight)
    return model


def read_file(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file by name."""
    tensors: Any = mx.load(str(path), format="safetensors")  # another type for each format
    return dict(tensors)


def _fill(
    module: nn.Module, tensors: dict[str, mx.array], dtype: mx.Dtype, bits: int | None
) -> None:
    """Load the weights of a module, and quantise the layers that allow it if `bits` is given."""
    module.load_weights(list(tensors.items()))
    module.set_dtype(dtype)
    if bits is not None:

        def fits(_: str, m: nn.Module) -> bool:
            return hasattr(m, "to_quantized") and m.weight.shape[-1] % GROUP_SIZE == 0

        nn.quantize(module, GROUP_SIZE, bits, class_predicate=fits)
    mx.eval([child.parameters() for child in module.modules()])  # also those of `DrafterModel.own`
