"""Loading: the entry point of the MLX backend."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TypeAlias

import mlx.core as mx
import numpy as np
from mlx import nn

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Extension
from treeflash.decoding.probe import TOLERANCES, check_trees
from treeflash.decoding.snapshots import MOST
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafter_config import DrafterConfig
from treeflash.drafters.loading import load_tensors
from treeflash.errors import BackendError, ConfigError
from treeflash_mlx import TF32_MAY_BE_ON
from treeflash_mlx.cache import KeyValues, release_freed_memory
from treeflash_mlx.drafter import Drafter
from treeflash_mlx.drafter_model import DrafterModel
from treeflash_mlx.head import ARHead
from treeflash_mlx.head_weights import make_module
from treeflash_mlx.linear import split_pairs
from treeflash_mlx.output_stage import OwnVocabulary
from treeflash_mlx.recurrent import RecurrentHead
from treeflash_mlx.state import State
from treeflash_mlx.storage import columns_for
from treeflash_mlx.target import Target
from treeflash_mlx.verifier import Verifier

Head: TypeAlias = ARHead | RecurrentHead
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZE = 64
STARTS = 4
"""How often a forward pass submits work to the device, at most."""


class MlxBackend:
    """`treeflash.decoding.interfaces.Backend` in MLX."""

    name = "mlx"

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
        self.verifier = Verifier(target, drafter)
        self.drafter = Drafter(drafter, target, draft_window) if drafter else None
        self.head = head
        self.device = "cpu" if mx.default_device().type == mx.cpu else "gpu"
        self.device_name = str(mx.device_info()["device_name"])
        self.dtype = str(target.dtype).removeprefix("mlx.core.")
        self.vocab_size = target.vocab_size
        self.max_positions = target.max_positions
        self.drafter_config: DrafterConfig | None = drafter.config if drafter else None

    def open(self, capacity: int, *, drafts: bool) -> State:
        """See `Backend.open`."""
        drafter = None
        if drafts and (config := self.drafter_config):
            drafter = KeyValues(config.num_hidden_layers, capacity + config.block_size)
        return State(self.target.new_key_values(capacity), drafter)

    def state_nbytes(self, capacity: int, *, drafts: bool) -> int:
        """See `Backend.state_nbytes`.

        Texts that run together have rows of the same size, that of the largest.
        """
        nbytes = columns_for(capacity) * self.target.column_nbytes
        nbytes += (1 + MOST) * self.target.states_nbytes
        if drafts and (config := self.drafter_config):
            heads = config.num_hidden_layers * config.num_key_value_heads
            column = 2 * heads * config.head_dim * self.target.dtype.size
            nbytes += columns_for(capacity + config.block_size) * column
        return nbytes

    def memory_bytes(self) -> int:
        """See `Backend.memory_bytes`."""
        return mx.get_peak_memory()


def load(target: Path, drafter: Path | None, config: LoadConfig) -> MlxBackend:
    """See `Loader`. MLX has one default device for the whole process; naming a device sets it."""
    if config.compile or config.device_map:
        option = "--compile" if config.compile else "--device-map"
        raise ConfigError(f"only the cuda backend has {option}; leave it out")
    on_cpu = choose_device(config.device)
    dtype = getattr(mx, config.dtype) if config.dtype else (mx.float32 if on_cpu else None)
    model = Target(target, dtype, config.kv_bits)
    if not on_cpu and model.dtype == mx.float32:
        warn_of_tf32()
    if drafter is None:
        backend = MlxBackend(model, None, None)
        model.batches = runs_batches(backend)
    else:
        pair = load_drafter(drafter, model, config.draft_bits)
        backend = MlxBackend(model, *pair, draft_window=config.draft_window)
        model.batches = runs_batches(backend)
        check_trees(backend)
    if not on_cpu:  # which would compute while it should build the rest of the pass
        model.hooks.start_early(model.layers[:: -(-len(model.layers) // STARTS)])
    release_freed_memory()
    return backend


def runs_batches(backend: MlxBackend) -> bool:
    """Whether texts of different lengths have the same logits in one pass as alone.

    Some models of mlx-lm take masks or offsets of one text only; their texts are run one by one.
    It is also the first call: some models make arrays then, which only this thread can evaluate.
    """
    texts = [TextSession(backend, capacity=32) for _ in range(2)]
    states, tree = [text.state for text in texts], DraftTree.root_only(0)
    prompts = [0, 1], [i % 3 for i in range(12)]
    try:
        for state, prompt in zip(states, prompts, strict=True):
            backend.verifier.run([Extension(state, prompt, None)])
        alone = [text.logits(tree) for text in texts]
        backend.target.batches = True
        together = backend.verifier.logits([(state, tree) for state in states])
    except (AttributeError, IndexError, TypeError, ValueError):
        return False
    finally:
        for text in texts:
            text.close()
    with np.errstate(invalid="ignore"):  # NaN is not an error yet
        errors = [
            np.sqrt(np.mean((x - y) ** 2)) / y.std() for x, y in zip(together, alone, strict=True)
        ]
    return bool(np.max(errors) <= TOLERANCES[backend.dtype])


def warn_of_tf32() -> None:
    """Warn if a GPU may round float32 products to TF32."""
    if TF32_MAY_BE_ON:
        warnings.warn(
            "MLX was imported before treeflash_mlx and may compute in TF32, where drafting can "
            "change tokens; set MLX_ENABLE_TF32=0 in the environment",
            stacklevel=3,
        )


def choose_device(name: str | None) -> bool:
    """Use the device of that name, or MLX's default; returns whether it is the CPU.

    Raises:
        BackendError: there is no such device.
    """
    if name not in (None, "cpu", "gpu"):
        raise BackendError(f"the mlx backend runs on gpu or cpu, not on {name!r}")
    if name == "gpu" and not (mx.metal.is_available() or mx.cuda.is_available()):
        raise BackendError("this MLX has no GPU; leave --device out or pass --device cpu")
    if name is not None:
        mx.set_default_device(mx.Device(getattr(mx, name)))
    if mx.metal.is_available() and mx.default_device().type == mx.gpu:
        # As mlx-lm does: keep the weights resident, as far as the system recommends.
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    return mx.default_device().type == mx.cpu


def load_drafter(
    folder: Path, target: Target, bits: int | None
) -> tuple[DrafterModel, Head | None]:
    """Read a drafter, check that it fits the target, and quantise it to `bits` if given."""
    if bits not in (None, *BITS):
        raise ConfigError(f"draft-bits must be one of {BITS}, got {bits}")
    target.check_drafting()
    tensors = load_tensors(
        folder,
        read_file,
        hidden_size=target.embed(mx.array([0])).shape[-1],
        vocab_size=target.vocab_size,
        num_hidden_layers=len(target.layers),
    )
    config = tensors.config
    target.capture(config.target_layer_ids)
    model = DrafterModel(config)
    _fill(model, tensors.backbone, target.dtype, bits)
    model.own = OwnVocabulary(tensors.vocabulary, target)
    _quantise(model.own, bits)
    if config.head is None:
        return model, None
    module = make_module(config, tensors.head_size, target.vocab_size)
    _fill(module, split_pairs(module, tensors.head), target.dtype, bits)
    kind = RecurrentHead if config.head_state_size else ARHead
    return model, kind(module, model, target)


def read_file(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file by name."""
    tensors: dict[str, mx.array] = mx.load(str(path), format="safetensors")
    return tensors


def _fill(
    module: nn.Module, tensors: dict[str, mx.array], dtype: mx.Dtype, bits: int | None
) -> None:
    module.load_weights(list(tensors.items()))
    module.set_dtype(dtype)
    _quantise(module, bits)


def _quantise(module: nn.Module, bits: int | None) -> None:
    """Quantise what can be, if a number of bits is given, and make the parameters."""
    if bits is not None:
        nn.quantize(
            module,
            GROUP_SIZE,
            bits,
            class_predicate=lambda _, m: (
                hasattr(m, "to_quantized") and m.weight.shape[-1] % GROUP_SIZE == 0
            ),
        )
    mx.eval(module.parameters())
