"""The target: an unmodified mlx-lm model, and what drafting needs from it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchLinear

from treeflash.decoding.recurrence import refusal
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_config
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash_mlx.cache import (
    KeyValues,
    Quantisation,
    QuantisedTreeCache,
    TreeCache,
    share_storage,
)
from treeflash_mlx.cache_layout import CacheLayout
from treeflash_mlx.config_compatibility import TEXT_CONFIGS
from treeflash_mlx.loading import load_model
from treeflash_mlx.recurrence import Solver
from treeflash_mlx.recurrent_states import RecurrentCache
from treeflash_mlx.solvers import choose_solver, solve_by_rounds
from treeflash_mlx.tree_hooks import TreeHooks, TreePass

EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "token_embeddings",
    "embeddings",
    "embedding",
    "embed_in",
)
OUTPUT_HEADS = ("lm_head", "output", "embed_out")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
KV_BITS = (4, 8)
GROUP_SIZES = (64, 32)
SIBLINGS = DraftTree.from_parents(np.zeros(3, np.int32), np.array([-1, 0, 0], np.int32))


class Target:
    """The weights of a target, hooked, and its forward pass."""

    def __init__(self, folder: Path, dtype: mx.Dtype | None, kv_bits: int | None) -> None:
        """Load a folder in the Hugging Face format, quantised by mlx-lm or not.

        Args:
            folder: with `config.json` and `model*.safetensors`.
            dtype: of all floating-point parameters; None leaves them as they are.
            kv_bits: of keys and values; None keeps them as they are.

        Raises:
            CheckpointError: it is damaged, or its weights do not fit its configuration.
            UnsupportedModelError: mlx-lm lacks the model type, or it cannot run draft trees.
            ConfigError: its keys and values cannot be quantised, or its dtype does not work.
        """
        config = read_config(folder)
        self.family = str(config.get("model_type"))
        self.config: Mapping[str, Any] = next(
            (config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), config
        )
        self.model = load_model(folder, config, dtype)
        self._check_experts()
        self.layers: Sequence[nn.Module] = self.model.layers
        self.layout = CacheLayout(self.family, make_prompt_cache(self.model))
        if self.family == "mistral" and "layer_types" not in self.config:
            # mlx-lm runs Mistral as Llama, without the sliding window of its layers.
            windows = self.layout.windows
            windows[:] = [self.config.get("sliding_window")] * len(windows)
        self.hooks = TreeHooks()
        self.hooks.hook_ropes(self.model)
        self.keys_first = "recurrent_gla" in self.hooks.hook_recurrent_layers(self.model)
        self.quantisation: Quantisation | None = None
        self.vocab_size, widths, self.column_nbytes, self.states_nbytes = self._shapes()
        if kv_bits is not None:
            self.quantisation = self._quantisation(kv_bits, widths)
            _, _, self.column_nbytes, _ = self._shapes()
        self.batches = False
        self.solve: Solver | None = solve_by_rounds if self.layout.sizes else None
        self.embedding = self._find(EMBEDDINGS, (nn.Embedding, nn.QuantizedEmbedding))
        self.lm_head = self._find(OUTPUT_HEADS, (nn.Linear, nn.QuantizedLinear))
        self.max_positions = int(
            next((self.config[key] for key in POSITIONS if self.config.get(key)), sys.maxsize)
        )

    def check_drafting(self) -> None:
        """Check what a drafter needs of this model and the load probe would not notice.

        Raises:
            UnsupportedModelError: it has no embedding table, scales queries by column, or has
                recurrent layers that no hook has seen.
        """
        if self.solve is not None:
            self.solve = choose_solver()
        if not self._runs_trees():
            raise UnsupportedModelError(refusal(self.family))
        if self.embedding is None:
            raise UnsupportedModelError(
                f"no embedding table was found in the {self.family} model, and a drafter needs it; "
                "--method ar decodes without one"
            )
        if (self.config.get("rope_parameters") or {}).get("llama_4_scaling_beta"):
            # The difference shows only after thousands of tokens, where no probe looks.
            raise UnsupportedModelError(
                f"mlx-lm's {self.family} scales queries by column instead of position, which is "
                "wrong in a draft tree; --method ar still works"
            )

    def capture(self, layer_ids: Collection[int]) -> None:
        """Hook those layers, so that a forward pass can return their outputs; -1: embeddings."""
        self.hooks.capture(self.layers, layer_ids)

    def embed(self, token_ids: mx.array) -> mx.array:
        """(..., hidden_size) rows of the embedding table, without any scaling by the model."""
        assert self.embedding is not None
        rows: mx.array = self.embedding(token_ids)
        return rows

    def output_head(self, hidden: mx.array) -> mx.array:
        """(..., vocab) logits of the output head alone."""
        assert self.embedding is not None
        logits: mx.array = (
            self.embedding.as_linear(hidden) if self.lm_head is None else self.lm_head(hidden)
        )
        return logits

    @property
    def output_module(self) -> nn.Module:
        """The module that holds the weights of the output head."""
        module = self.embedding if self.lm_head is None else self.lm_head
        assert module is not None
        return module

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that the model computes in."""
        dtype: mx.Dtype = next(
            x.dtype
            for _, x in tree_flatten(self.model.parameters())
            if mx.issubdtype(x.dtype, mx.floating)
        )
        return dtype

    def new_key_values(self, capacity: int) -> KeyValues:
        """Those of a new text."""
        return KeyValues(
            len(self.layout.windows),
            capacity,
            self.quantisation,
            recurrent=self.layout.sizes,
            keys_first=self.keys_first,
        )

    def forward(
        self,
        token_ids: mx.array,
        texts: Sequence[KeyValues],
        layer_ids: tuple[int, ...],
        tree: TreePass | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """Build a forward pass of n tokens of each text, and write their keys and values.

        Args:
            token_ids: (texts, n).
            texts: those of one storage, by row.
            layer_ids: the captured layers whose outputs to return.
            tree: the trees that the tokens form; None if they continue one text.

        Returns:
            (texts, n, vocab) logits; (texts, n, len(layer_ids) * hidden_size) outputs, None without
            layers.
        """
        storage = share_storage(texts)
        start = texts[0].length
        first: dict[int, int] = {}
        caches = self.layout.make(
            lambda i: self._cache(storage, i, self.layout.windows[i], start, tree, first),
            lambda i: RecurrentCache(
                storage.states, i, None if tree is None else tree.paths, self.hooks.reads
            ),
        )
        with self.hooks.forward_pass(tree, capture=bool(layer_ids)) as outputs:
            logits = self.model(token_ids, cache=caches)
        if not layer_ids:
            return logits, None
        return logits, mx.concatenate([outputs[i] for i in layer_ids], axis=-1)

    def _cache(self, *args: Any) -> TreeCache:
        if self.quantisation is None:
            return TreeCache(*args)
        return QuantisedTreeCache(self.quantisation, *args)

    def _check_experts(self) -> None:
        """Refuse what MLX refuses only when it evaluates a pass."""
        if (
            mx.default_device().type == mx.cpu
            and self.dtype != mx.float32
            and any(isinstance(module, SwitchLinear) for module in self.model.modules())
        ):
            raise ConfigError(
                "MLX runs a mixture of experts on a CPU in float32 only; pass --dtype float32"
            )

    def _runs_trees(self) -> bool:
        """Whether hooks see every state, in a pass over a tree that is never evaluated."""
        if not self.layout.sizes:
            return True
        text = self.new_key_values(len(SIBLINGS))
        tree = TreePass.of([SIBLINGS], [0], 0, solve=self.solve)
        self.forward(mx.zeros((1, len(SIBLINGS)), mx.int32), [text], (), tree)
        assert text.storage is not None
        return text.storage.states.is_complete

    def _shapes(self) -> tuple[int, set[int], int, int]:
        """What a pass that is never evaluated shows.

        Returns:
            The vocabulary size, the widths of keys and values, the bytes of those of a position,
            and the bytes of the states of a text.
        """
        text = self.new_key_values(1)
        try:
            logits, _ = self.forward(mx.array([[0]]), [text], ())
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            if self.quantisation is not None:
                raise ConfigError(
                    f"{self.family} models cannot attend to quantised keys and values ({error}); "
                    "leave --kv-bits out"
                ) from error
            raise UnsupportedModelError(
                f"mlx-lm's {self.family} cannot work with a cache that branches ({error}); "
                "choose another target"
            ) from error
        storage = text.storage
        assert storage is not None
        if not storage.states.is_complete:
            raise UnsupportedModelError(refusal(self.family))
        storage.keep({0: (0, np.zeros(1, np.int32))})
        widths = {x.shape[-1] for arrays in storage.layers for x in arrays}
        column = storage.columns_nbytes // storage.columns
        return logits.shape[-1], widths, column, storage.states.nbytes

    def _quantisation(self, bits: int, widths: set[int]) -> Quantisation:
        """The group size for keys and values of these widths."""
        if bits not in KV_BITS:
            raise ConfigError(f"kv-bits must be one of {KV_BITS}, got {bits}")
        sizes = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
        if not sizes:
            raise ConfigError(
                f"quantised keys and values need heads whose width is a multiple of "
                f"{GROUP_SIZES[-1]}, {self.family} has {sorted(widths)}; leave --kv-bits out"
            )
        return Quantisation(bits, sizes[0])

    def _find(self, names: Collection[str], kinds: tuple[type[nn.Module], ...]) -> nn.Module | None:
        """The module nearest to the root with one of the names and a row for each token."""
        found = [
            (path.count("."), path, module)
            for path, module in self.model.named_modules()
            if path.rpartition(".")[2] in names
            and isinstance(module, kinds)
            and module.weight.shape[0] >= self.vocab_size
        ]
        return min(found, key=lambda item: item[:2])[2] if found else None


def shortlist_logits(module: nn.Module, hidden: mx.array, tokens: mx.array) -> mx.array:
    """(..., n, t) logits of some tokens, from (..., n, hidden_size) and (..., t) ids.

    Args:
        module: a linear layer or an embedding, quantised or not.
        hidden: the inputs of the output head.
        tokens: the rows of the module's weight.
    """
    weight = module.weight[tokens]
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        biases = None if module.biases is None else module.biases[tokens]
        weight = mx.dequantize(
            weight, module.scales[tokens], biases, module.group_size, module.bits, module.mode
        )
    logits: mx.array = hidden @ weight.astype(hidden.dtype).swapaxes(-1, -2)
    return logits + module["bias"][tokens][..., None, :] if "bias" in module else logits
