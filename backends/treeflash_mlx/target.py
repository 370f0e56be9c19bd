"""The target: an unmodified mlx-lm model that runs draft trees.

`load_model` reads a folder, with the settings under the names that mlx-lm knows. `CacheLayout` says
which caches the model takes. `Target` hooks the model and builds its forward passes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ArraysCache, CacheList, RotatingKVCache, make_prompt_cache
from mlx_lm.models.switch_layers import SwitchLinear
from numpy.typing import NDArray

from treeflash.decoding.families import family_of, refusal
from treeflash.decoding.image_processor import Processor, load_processor
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.adapter import merge_adapter
from treeflash.drafters.folder import read_config, stored_tensors
from treeflash.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedModelError,
    first_line,
    is_out_of_memory,
)
from treeflash_mlx import images as vision
from treeflash_mlx.attention import TreeHooks, TreePass, keep_queries
from treeflash_mlx.cache import (
    KVCache,
    PassWrites,
    Quantisation,
    QuantisedTreeCache,
    TreeCache,
    share_storage,
)
from treeflash_mlx.group_attention import FEW_ROWS
from treeflash_mlx.hybrid import RecurrentTreeCache, Solver, choose_solver, solve_by_rounds
from treeflash_mlx.images import ImageRows, VisionTower, channel_axes, load_tower
from treeflash_mlx.metal_kernels.attention import Shape, winning_columns
from treeflash_mlx.metal_kernels.products import use_everywhere

TEXT_CONFIGS = ("text_config", "language_config")
ACTIVATIONS = {
    ("hidden_act", "silu"): (
        "afmoe baichuan_m1 bailing_hybrid bailing_moe bailing_moe_linear bailing_moe_v3 cohere "
        "cohere2 deepseek deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5 ernie4_5_moe "
        "exaone4 exaone_moe falcon_h1 falcon_mamba glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa "
        "granite granitemoe granitemoehybrid helium hunyuan hunyuan_v1_dense internlm2 internlm3 "
        "iquestcoder iquestloopcoder jamba joyai_llm_flash kimi_k2 kimi_k25 kimi_linear kimi_vl "
        "Klear laguna llama llama4 llama4_text llava longcat_flash longcat_flash_ngram mamba "
        "mamba2 mellum mimo mimo_v2_flash minicpm minicpm3 minimax minimax_m2 ministral3 mistral "
        "mistral3 mistral4 mixtral muse_spark nanbeige olmo olmo2 olmo3 olmo_hybrid olmoe phi3 "
        "phimoe pixtral qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe "
        "qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe seed_oss "
        "smollm3 solar_open stablelm step3p5 telechat3 xverse youtu_llm"
    ),
    ("hidden_act", "gelu"): "gemma gpt_neox phi starcoder2",
    ("hidden_act", "relu2"): "bitnet nanochat nemotron",
    ("hidden_act", "xielu"): "apertus",
    ("mlp_hidden_act", "relu2"): "nemotron_h",
    ("hidden_activation", "silu"): "muse_glimmer",
    ("hidden_activation", "gelu"): (
        "gemma2 gemma3 gemma3_text gemma3n gemma4 gemma4_text gemma4_unified recurrent_gemma"
    ),
    ("activation_function", "silu"): "exaone",
    ("activation_function", "gelu"): "gpt2 gpt_bigcode gptj phi-msft phixtral",
}
"""By setting and activation, the model types that mlx-lm computes with this activation, whatever
the setting says."""
SAME_ACTIVATIONS = {
    "silu": "silu swish",
    # mlx-lm approximates it for some types and not for others, unlike their configurations.
    "gelu": (
        "gelu gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh"
    ),
}
"""Other names of an activation."""


HEAD = "lm_head.weight"
TABLES = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
)
"""Names of the output head and of the embeddings in a folder."""


def load_model(folder: Path, config: Mapping[str, Any], dtype: mx.Dtype | None) -> nn.Module:
    """Load the model of a Hugging Face folder; a `dtype` of None keeps the weights' dtype.

    Raises a CheckpointError if the folder is damaged, or its weights do not fit its configuration,
    and an UnsupportedModelError if mlx-lm lacks the model type, its activation, or the order of the
    layers.
    """
    refuse_ignored_activation(config)
    if not list(folder.glob("model*.safetensors")):
        raise CheckpointError(f"{folder} has no model*.safetensors, which mlx-lm needs")
    try:
        settings = compatible_settings(config)
        if (mlx_type := family_of(config.get("model_type")).mlx_type) is not None:
            settings["model_type"] = mlx_type
        if has_own_head(folder, config):
            # Most models of mlx-lm would use the embeddings instead, or ask for the setting.
            settings["tie_word_embeddings"] = False
        model, _ = utils.load_model(
            folder, lazy=True, model_config=settings, get_model_classes=_model_classes
        )
        if dtype is not None:
            model.set_dtype(dtype)
        mx.eval(model.parameters())
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):  # the folder is not the reason
            raise
        if isinstance(error.__cause__, ImportError):
            raise UnsupportedModelError(
                f"mlx-lm does not support the model type {config.get('model_type')!r}; "
                "use the cuda backend"
            ) from error
        # mlx-lm lists missing parameters over many lines.
        reason = shorten(str(error) or type(error).__name__, 300)
        raise CheckpointError(f"mlx-lm cannot load {folder}: {reason}") from error
    _refuse_missing_scales(folder, model)
    return model


SCALES = "scales", "weight_scale"
"""Names of the scales of quantised weights in mlx-lm's models."""


def _refuse_missing_scales(folder: Path, model: nn.Module) -> None:
    """Raise a CheckpointError for weights of integers or FP8 that mlx-lm took for numbers."""
    parameters = dict(tree_flatten(model.parameters()))
    for name, x in parameters.items():
        layer, _, part = name.rpartition(".")
        has_scales = any(f"{layer}.{scales}" in parameters for scales in SCALES)
        if part == "weight" and not has_scales and not mx.issubdtype(x.dtype, mx.floating):
            raise CheckpointError(
                f"{folder} has quantised weights without the scales that MLX reads, such as "
                f"{name}; use a conversion for MLX, or the original model"
            )


def has_own_head(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether a folder has an output head, though its configuration does not say so.

    As in transformers, a head counts that is stored beside tied embeddings and is unlike them.
    """
    tensors = stored_tensors(folder)
    if HEAD not in tensors or config.get("tie_word_embeddings") is False:
        return False
    table = next((name for name in TABLES if name in tensors), None)
    if table is None or "tie_word_embeddings" not in config:
        return True
    files: list[Any] = [mx.load(str(tensors[name].path)) for name in (HEAD, table)]  # lazily
    own, tied = files[0][HEAD], files[1][table]
    return own.shape != tied.shape or not mx.array_equal(own, tied).item()


def refuse_ignored_activation(config: Mapping[str, Any]) -> None:
    """Raise an UnsupportedModelError for an activation that mlx-lm replaces by another."""
    kind, texts = config.get("model_type"), (config.get(key) for key in TEXT_CONFIGS)
    text = next((text for text in texts if isinstance(text, Mapping)), config)
    for (setting, computed), types in ACTIVATIONS.items():
        names = SAME_ACTIVATIONS.get(computed, computed).split()
        if kind in types.split() and text.get(setting) not in (None, *names):
            raise UnsupportedModelError(
                f"mlx-lm computes {kind} models with the activation {computed}, and this one has "
                f"{text[setting]!r}; use the cuda backend"
            )


def _model_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
    """Find the classes of a model and of its arguments; weights may have published names."""
    model, arguments = utils._get_classes(config)
    names = family_of(config["model_type"]).mlx_weights

    def sanitize(self: nn.Module, weights: dict[str, mx.array]) -> Any:
        for published, name in names.items():
            weights = {key.replace(published, name): x for key, x in weights.items()}
        if (decoder := getattr(self, "language_model", None)) is not None:
            weights = decoder.sanitize(weights)  # mlx-lm's `lfm2-vl` leaves it out
        return model.sanitize(self, weights)

    return type(model.__name__, (model,), {"sanitize": sanitize}) if names else model, arguments


MOVED = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    "original_max_position_embeddings": ("original_max_position_embeddings",),
}
"""Settings that transformers 5 moved into `rope_parameters`, and their earlier names."""
SLIDING_THETA = ("rope_local_base_freq", "swa_rope_theta")
"""Earlier names of the rotary base of sliding layers."""
RENAMED = {"num_experts": "num_local_experts", "sliding_window_pattern": "_sliding_window_pattern"}
"""mlx-lm's names of other settings, and the names under which transformers 5 saves them."""


def compatible_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries to add to a `config.json` so that it has all that mlx-lm reads.

    transformers 5 writes `rope_parameters`, for the whole model or for each type of layer; older
    files have `rope_theta` and `rope_scaling`. Most models of mlx-lm know one of the two, and
    silently use a default if they do not find it. Existing entries stay as they are, except the
    types of the layers of hybrid models. Raises an UnsupportedModelError if mlx-lm would order the
    layers differently.
    """
    added: dict[str, Any] = {}
    if config.get("rope_parameters"):
        added = _old_rope_settings(config["rope_parameters"])
    elif "rope_theta" in config or config.get("rope_scaling"):
        scaling = dict(config.get("rope_scaling") or {})
        theta = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
        added["rope_parameters"] = {**theta, **scaling, "rope_type": _rope_type(scaling)}
    added |= {ours: config.get(saved) for ours, saved in RENAMED.items()}
    added = {k: x for k, x in added.items() if x is not None and config.get(k) is None}
    layer_settings = family_of(config.get("model_type")).mlx_settings
    if layer_settings is not None and config.get("layer_types"):
        added |= layer_settings(config, config["layer_types"])
    for key in TEXT_CONFIGS:
        if isinstance(config.get(key), Mapping):
            added[key] = {**config[key], **compatible_settings(config[key])}
    return added


def _old_rope_settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    added: dict[str, Any] = {}
    by_layer = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    if by_layer:
        sliding = by_layer.get("sliding_attention", {})
        added |= dict.fromkeys(SLIDING_THETA, sliding.get("rope_theta"))
        parameters = by_layer.get("full_attention", sliding)
    for key, names in MOVED.items():
        added |= dict.fromkeys(names, parameters.get(key))
    if (kind := _rope_type(parameters)) != "default":
        added["rope_scaling"] = {**parameters, "rope_type": kind, "type": kind}
    return added


def _rope_type(parameters: Mapping[str, Any]) -> Any:
    return parameters.get("rope_type", parameters.get("type", "default"))


CacheMaker: TypeAlias = Callable[[int], Any]
"""Makes the cache of a layer from its index among the layers of its kind."""


class CacheLayout:
    """The caches of a model, in the order in which it takes them.

    Attributes:
        windows: of the attention layers, in positions; None for a layer that attends to everything.
        state_counts: per recurrent layer, its number of states.
    """

    def __init__(self, family: str, caches: Sequence[Any]) -> None:
        """Read mlx-lm's caches; raises an UnsupportedModelError for one of an unknown kind."""
        self.windows: list[int | None] = []
        self.state_counts: list[int] = []
        self._slots = [self._slot(family, cache) for cache in caches]

    def make(self, attention: CacheMaker, recurrent: CacheMaker) -> list[Any]:
        return [slot(attention, recurrent) for slot in self._slots]

    def _slot(self, family: str, cache: Any) -> Callable[[CacheMaker, CacheMaker], Any]:
        """Return a function that makes the cache in place of one of mlx-lm's."""
        kind = type(cache)
        if kind is CacheList:  # a layer with several kinds of state
            parts = [self._slot(family, part) for part in cache.caches]
            return lambda *makers: CacheList(*(part(*makers) for part in parts))
        if kind is ArraysCache:
            index = len(self.state_counts)
            self.state_counts.append(len(cache.cache))
            return lambda attention, recurrent: recurrent(index)
        if kind is mlx_lm_cache.KVCache or (kind is RotatingKVCache and not cache.keep):
            index = len(self.windows)
            self.windows.append(cache.max_size if kind is RotatingKVCache else None)
            return lambda attention, recurrent: attention(index)
        raise UnsupportedModelError(
            f"{family} models keep a {kind.__name__}, which cannot branch into a draft tree; "
            "choose another target"
        )


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


def add_adapter(model: nn.Module, folder: Path) -> None:
    """Merge a LoRA adapter into a model, computed in float32; see `merge_adapter` for errors."""

    def problem(module: nn.Module) -> str | None:
        if isinstance(module, nn.QuantizedLinear):
            return "it is quantised; dequantise the target"
        return None if isinstance(module, nn.Linear) else "it is no linear layer"

    def add(module: nn.Module, update: NDArray[np.float32]) -> None:
        merged = module.weight.astype(mx.float32) + mx.array(update)
        module.weight = merged.astype(module.weight.dtype)

    merge_adapter(folder, dict(model.named_modules()), problem, add)
    mx.eval(model.parameters())


class Target:
    """The weights of a target, hooked, and its forward pass.

    Attributes:
        config: of the text model.
        keys_first: whether matrix states have the shape (key_dim, value_dim).
        column_nbytes: size of the keys and values of one position in all layers, bytes.
        states_nbytes: size of the recurrent states of one sequence, bytes.
        head_dim: the largest width of keys and values; 0 without attention.
        batches: whether sequences of different lengths may share a forward pass.
        exact: whether all passes use the kernels of exact mode; see `use_exact_kernels`.
        solve: for recurrent layers; None without recurrent layers.
        embedding: the input table; None if it was not found.
        lm_head: the output head; None if the embedding is used.
        max_positions: positions that the model was made for.
    """

    def __init__(
        self, folder: Path, dtype: mx.Dtype | None, kv_bits: int | None, adapter: Path | None = None
    ) -> None:
        """Load a folder in the Hugging Face format, whose weights mlx-lm may have quantised.

        Without `dtype` or `kv_bits`, parameters or keys and values stay as they are. It raises what
        `load_model` does, an UnsupportedModelError also for a model that cannot run draft trees,
        and a ConfigError if it does not work with `dtype` or `kv_bits`.
        """
        config = read_config(folder)
        self.family = str(config.get("model_type"))
        self.config: Mapping[str, Any] = next(
            (config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), config
        )
        self.model = load_model(folder, config, dtype)
        if adapter is not None:
            add_adapter(self.model, adapter)
        self._check_experts()
        self.layers: Sequence[nn.Module] = self.model.layers
        self.layout = CacheLayout(self.family, make_prompt_cache(self.model))
        if self.family == "mistral" and "layer_types" not in self.config:
            # mlx-lm runs Mistral as Llama, without the sliding window of its layers.
            windows = self.layout.windows
            windows[:] = [self.config.get("sliding_window")] * len(windows)
        if kv_bits is not None:
            keep_queries(self.model)
        self.hooks = TreeHooks()
        self.keys_first = "recurrent_gla" in self.hooks.hook(self.model)
        self.quantisation: Quantisation | None = None
        self.exact = False
        self.trees_are_right = False  # until a check has passed
        self._attended: set[Shape] = set()  # layers that the kernel of attention can run
        self.vocab_size, widths, self.column_nbytes, self.states_nbytes = self._measure()
        self.head_dim = max(widths, default=0)
        if kv_bits is not None:
            self.quantisation = self._choose_quantisation(kv_bits, widths)
            _, _, self.column_nbytes, _ = self._measure()
        self.batches = False
        self.solve: Solver | None = solve_by_rounds if self.layout.state_counts else None
        self.embedding = self._find(EMBEDDINGS, (nn.Embedding, nn.QuantizedEmbedding))
        self.lm_head = self._find(OUTPUT_HEADS, (nn.Linear, nn.QuantizedLinear))
        self.tower: VisionTower | None = None  # None if the target takes no images
        self.processor: Processor | str = "it is used as a text model"  # or why it takes none
        self.max_positions = int(
            next((self.config[key] for key in POSITIONS if self.config.get(key)), sys.maxsize)
        )

    def use_exact_kernels(self) -> None:
        """Use the Metal kernels whose rows do not depend on each other, in all passes from now on.

        Layers that they cannot run keep MLX's operations, which the check at load then names.
        """
        use_everywhere(self.model)
        self.exact = True

    def chains_from(self, rows: int) -> float:
        """Return from how many columns on a chain of some rows should run as a tree.

        mlx-lm would read the keys for each row; the kernel of attention reads them once.
        """
        if not self.trees_are_right:
            return math.inf
        few = rows <= FEW_ROWS
        return min((winning_columns(shape, few=few) for shape in self._attended), default=math.inf)

    def load_images(self, folder: Path) -> None:
        """Load the processor and the tower of a folder, if the target takes images."""
        config = read_config(folder)
        self.processor = load_processor(folder, config, "mlx", vision.read_processor)
        if isinstance(self.processor, str):
            return
        try:
            self.tower = load_tower(folder, config, self.embed, self.dtype)
        except Exception as error:  # mlx-vlm raises any
            if is_out_of_memory(error):
                raise
            self.processor = f"mlx-vlm cannot load its vision tower ({first_line(error)})"
            return
        self.hooks.axes = channel_axes(self.config)
        deep = config["vision_config"].get("deepstack_visual_indexes") or ()
        self.hooks.add_features(self.layers[: len(deep)])

    def check_drafting(self) -> None:
        """Check what a drafter needs of this model and `check_trees` would not notice.

        Raises an UnsupportedModelError if the model has no embedding table.
        """
        if self.embedding is None:
            raise UnsupportedModelError(
                f"no embedding table was found in the {self.family} model, which a drafter needs; "
                "use method suffix or ar"
            )

    def check_trees(self) -> None:
        """Check what draft trees need of this model and a comparison of logits would not notice.

        Raises an UnsupportedModelError if the model scales queries by column, or has recurrent
        layers that the hooks do not reach.
        """
        if self.solve is not None:
            self.solve = choose_solver()
        if not self._runs_trees():
            raise UnsupportedModelError(refusal(self.family))
        if self.scales_by_column:
            # The difference shows only after thousands of tokens, which `check_trees` does not run.
            raise UnsupportedModelError(
                f"mlx-lm scales the queries of {self.family} models by column instead of position, "
                "which is wrong in a draft tree; use method ar"
            )

    @property
    def scales_by_column(self) -> bool:
        """Whether mlx-lm scales queries by the columns of a pass's first sequence."""
        parameters = self.config.get("rope_parameters") or {}
        return bool(parameters.get("llama_4_scaling_beta"))

    def capture(self, layer_ids: Collection[int]) -> None:
        """Let `forward` return the outputs of these layers.

        -1 stands for the embeddings, and the number of layers for the final norm.
        """
        layers = list(self.layers)
        if len(layers) in layer_ids:
            layers.append(self._decoder())
        self.hooks.capture(layers, layer_ids)

    def embed(self, token_ids: mx.array) -> mx.array:
        """Look up (..., hidden_size) rows of the embedding table, without the model's scaling."""
        assert self.embedding is not None
        return self.embedding(token_ids)

    def output_head(self, hidden: mx.array) -> mx.array:
        """Return the (..., vocab) logits of the output head alone."""
        assert self.embedding is not None
        return self.embedding.as_linear(hidden) if self.lm_head is None else self.lm_head(hidden)

    @property
    def output_module(self) -> nn.Module:
        module = self.embedding if self.lm_head is None else self.lm_head
        assert module is not None
        return module

    @property
    def dtype(self) -> mx.Dtype:
        parameters = (x for _, x in tree_flatten(self.model.parameters()))
        return next(x.dtype for x in parameters if mx.issubdtype(x.dtype, mx.floating))

    def new_kv_cache(self, capacity: int) -> KVCache:
        windows, counts = self.layout.windows, self.layout.state_counts
        return KVCache(len(windows), capacity, self.quantisation, counts, self.keys_first)

    def forward(
        self,
        token_ids: mx.array,
        sequences: Sequence[KVCache],
        layer_ids: tuple[int, ...],
        tree: TreePass | None = None,
        images: ImageRows | None = None,
    ) -> tuple[mx.array, mx.array | None, PassWrites]:
        """Build a forward pass of (batch, n) tokens, and write their keys and values.

        `images` are the embeddings of the tokens of a single sequence; some are features.
        The sequences are all of one storage, by row. `tree` is None if the tokens continue one.
        Returns (batch, n, vocab) logits; (batch, n, len(layer_ids) * hidden_size) outputs of
        captured layers, None without layers; and what a commit needs.
        """
        storage = share_storage(sequences)
        start, windows = sequences[0].length, self.layout.windows
        window_starts: dict[int, int] = {}
        if tree is None and self.exact:
            chain = DraftTree.chain(np.zeros(token_ids.shape[1], np.int32))
            tree = TreePass.build([chain], [start], storage.columns - 1, exact=True)

        written = PassWrites([()] * len(windows))

        def attention_cache(i: int) -> TreeCache:
            args = storage, written, i, windows[i], start, tree, window_starts
            if (q := self.quantisation) is None:
                return TreeCache(*args)
            return QuantisedTreeCache(*args, q.bits, q.group_size)

        def recurrent_cache(i: int) -> RecurrentTreeCache:
            paths = None if tree is None else tree.paths
            hook = self.hooks.enter_recurrent_layer
            written.recurrent.append(RecurrentTreeCache(storage.states, i, paths, hook))
            return written.recurrent[-1]

        caches = self.layout.make(attention_cache, recurrent_cache)
        given = {}
        if images is not None:
            # Gemma 4 also looks up embeddings of each layer by the ids.
            token_ids, given = images.token_ids, {"input_embeddings": images.embeddings}
        with self.hooks.forward_pass(tree, None if images is None else images.deep) as outputs:
            logits = self.model(token_ids, cache=caches, **given)
        if tree is not None:
            self._attended |= tree.shapes
        layers = mx.concatenate([outputs[i] for i in layer_ids], axis=-1) if layer_ids else None
        return logits, layers, written

    def _decoder(self) -> nn.Module:
        """Find the module that runs the layers and the final norm."""
        modules = (x for _, x in self.model.named_modules() if x.get("layers"))
        return next(x for x in modules if x["layers"][0] is self.layers[0])

    def _check_experts(self) -> None:
        """Raise now what MLX would raise only when it evaluates a pass."""
        if (
            mx.default_device().type == mx.cpu
            and self.dtype != mx.float32
            and any(isinstance(module, SwitchLinear) for module in self.model.modules())
        ):
            raise ConfigError(
                "on a CPU, MLX runs a mixture of experts in float32 only; use dtype float32"
            )

    def _runs_trees(self) -> bool:
        """Return whether hooks see every state, in a pass over a tree that is never evaluated."""
        if not self.layout.state_counts:
            return True
        sequence = self.new_kv_cache(len(SIBLINGS))
        tree = TreePass.build([SIBLINGS], [0], 0, solve=self.solve)
        *_, written = self.forward(mx.zeros((1, len(SIBLINGS)), mx.int32), [sequence], (), tree)
        return written.is_complete

    def _measure(self) -> tuple[int, set[int], int, int]:
        """Read `vocab_size`, the widths of keys and values, `column_nbytes` and `states_nbytes`.

        They are the shapes of the arrays of a pass that is never evaluated.
        """
        sequence = self.new_kv_cache(1)
        try:
            logits, _, written = self.forward(mx.array([[0]]), [sequence], ())
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            if self.quantisation is not None:
                raise ConfigError(
                    f"kv_bits is not supported for {self.family} models, which cannot attend to "
                    f"quantised keys and values ({error})"
                ) from error
            raise UnsupportedModelError(
                f"mlx-lm's {self.family} models do not work with a cache that branches ({error}); "
                "choose another target"
            ) from error
        storage = sequence.storage
        assert storage is not None
        if not written.is_complete:
            raise UnsupportedModelError(refusal(self.family))
        storage.commit(written, {0: (0, np.zeros(1, np.int32))})
        widths = {x.shape[-1] for arrays in storage.layers for x in arrays}
        column_nbytes = storage.columns_nbytes // storage.columns
        return logits.shape[-1], widths, column_nbytes, storage.states.nbytes

    def _choose_quantisation(self, bits: int, widths: set[int]) -> Quantisation:
        """Choose the quantisation of keys and values of these widths, in the largest groups."""
        sizes = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
        if not sizes:
            raise ConfigError(
                f"kv_bits needs keys and values whose width is a multiple of {GROUP_SIZES[-1]}, "
                f"but {self.family} has the widths {sorted(widths)}"
            )
        return Quantisation(bits, sizes[0])

    def _find(self, names: Collection[str], kinds: tuple[type[nn.Module], ...]) -> nn.Module | None:
        """Find the module nearest to the root with one of the names and a row for each token."""
        candidates = [
            (path.count("."), path, module)
            for path, module in self.model.named_modules()
            if path.rpartition(".")[2] in names
            and isinstance(module, kinds)
            and module.weight.shape[0] >= self.vocab_size
        ]
        return min(candidates, key=lambda item: item[:2])[2] if candidates else None


def shortlist_logits(module: nn.Module, hidden: mx.array, tokens: mx.array) -> mx.array:
    """Return the (..., n, t) logits of some tokens, from (..., n, hidden_size) and (..., t) ids.

    The module is a linear layer or an embedding, quantised or not.
    """
    weight, logits = module.weight[tokens], hidden[..., :0]
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
        logits = mx.quantized_matmul(
            hidden,
            weight,
            module.scales[tokens],
            None if module.biases is None else module.biases[tokens],
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        )
    else:
        logits = hidden @ weight.astype(hidden.dtype).swapaxes(-1, -2)
    return logits + module["bias"][tokens][..., None, :] if "bias" in module else logits
