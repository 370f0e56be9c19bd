"""A target that is a causal language model of transformers, loaded unmodified.

The layers may be placed on several devices. Then each module takes its inputs to its own device.
The model's inputs and outputs are on the device of its embeddings, where drafts are made and tokens
are sampled.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from logging import LogRecord
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import __version__ as version
from transformers.utils import logging

from treeflash.config import LoadConfig
from treeflash.decoding.backend_base import arrays_nbytes
from treeflash.decoding.families import ImageFamily, image_family, refusal
from treeflash.decoding.image_processor import TOKEN_TYPES, Processor
from treeflash.decoding.passed_checks import PassedChecks
from treeflash.decoding.probe import (
    INEXACT,
    TOLERANCE_FACTOR,
    TOLERANCES,
    ImageSample,
    errors_of_model,
)
from treeflash.drafters.adapter import SHARED_WEIGHT, merge_adapter
from treeflash.drafters.folder import weight_files
from treeflash.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedModelError,
    first_line,
    is_device_lost,
    is_out_of_memory,
)
from treeflash_cuda.attention import TokenBlock
from treeflash_cuda.cache import Span, check_quantisation
from treeflash_cuda.cpu.low_bit_loading import UNPACKED_BITS, is_packed, keeps_bits
from treeflash_cuda.exact import (
    bound_products,
    check_activations,
    check_products,
    pack_activations,
    token_rows,
)
from treeflash_cuda.exact_attention import check_attention
from treeflash_cuda.gpu.exact_products import use_kernel_for_products
from treeflash_cuda.gpu.state_arena import StateArena
from treeflash_cuda.hf.attention_contexts import (
    IMPLEMENTATION,
    MASK,
    AttentionInputs,
    MaskedContext,
    attention_context,
    capture_output,
    is_attending,
)
from treeflash_cuda.hf.hybrid import (
    MAMBA_2,
    HybridCache,
    hook_recurrent_layers,
)
from treeflash_cuda.hf.low_bit_models import LowBitConfig
from treeflash_cuda.hf.model_pass import CHECKED_TOKENS, ModelPasses
from treeflash_cuda.images import VisionTower, has_tower, run_samples
from treeflash_cuda.linear import is_subclass, pack_linears, rounding
from treeflash_cuda.low_bit_linear import LowBitEmbedding, LowBitLinear
from treeflash_cuda.recurrent_states import RecurrentStates
from treeflash_cuda.state import State
from treeflash_cuda.target import (
    RECURRENT_LAYERS,
    refuse_stateful,
)

FIXED_ATTENTION = "their attention layers do not support other attention functions"

CACHES = "cache", "past_key_values", "cache_params"
"""Names of the argument by which models take a cache. transformers has only the first since 5.24,
and warns about the others at every call; the last warning was about models without attention."""


SCALES = "weight_scale", "scales"
"""Beginnings of the names of tensors that a layer's weight is multiplied by."""


def load_model(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    processes: int = 1,
    device_map: str | None = None,
    images: bool = False,
) -> PreTrainedModel:
    """Load the model of a folder in the Hugging Face format, for inference; see `Target`.

    With `images` it has its vision tower. Without, it may have one: transformers has some types as
    a whole alone.

    Raises a CheckpointError if the folder is damaged or incomplete, or its weights do not fit its
    configuration, and an UnsupportedModelError if the weights are quantised, and transformers does
    not know how, or a package for that is not installed.
    """
    weight_files(folder)
    placement: dict[str, Any] = {}
    if processes > 1:
        from transformers.distributed import DistributedConfig

        placement = {"distributed_config": DistributedConfig(tp_size=processes, tp_plan="auto")}
    elif device_map is not None or device.type != "cpu":
        # A quantised model must not be moved; other models would be in memory twice.
        placement = {"device_map": device_map or {"": device}}
    is_known = isinstance(image_family(config.model_type, "cuda"), ImageFamily)
    whole = images or (is_known and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    # The errors below say in one line what the report of transformers says in a table.
    log = logging.get_logger("transformers.modeling_utils")
    log.addFilter(_is_no_report)
    try:
        model, info = (
            AutoModelForImageTextToText if whole else AutoModelForCausalLM
        ).from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            attn_implementation={"": "eager", "vision_config": "sdpa"} if whole else "eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **placement,
        )
    except ImportError as error:
        raise UnsupportedModelError(
            f"{folder} needs a package that is not installed ({first_line(error)}); install it, "
            "or use weights that are not quantised"
        ) from error
    except Exception as error:  # the model's own code, for sizes that it cannot have
        if is_out_of_memory(error) or is_device_lost(error):
            raise
        reason = first_line(error)
        if "above report" in reason:
            reason = "its weights do not have the form that its configuration asks for"
        elif isinstance(error, KeyError):
            reason = f"transformers does not know {reason}"
        raise CheckpointError(f"{folder} cannot be loaded: {reason}") from error
    finally:
        log.removeFilter(_is_no_report)
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder} lacks the tensor {missing[0]}")
    _refuse_unread_scales(folder, info["unexpected_keys"], model.state_dict())
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise CheckpointError(
            f"{folder} cannot be loaded: the tensor {name} has the shape {tuple(stored)}, and its "
            f"config.json asks for {tuple(expected)}"
        )
    return model.eval()


def _refuse_unread_scales(folder: Path, unread: Collection[str], weights: Collection[str]) -> None:
    """Raise for weights whose scales are among the tensors that transformers does not read.

    It only warns of a quantisation that it does not know, such as ModelOpt's, and says nothing if
    `config.json` does not name one. The weights would then be the numbers without their scales.
    """
    for name in sorted(unread):
        layer, _, part = name.rpartition(".")
        if part.startswith(SCALES) and f"{layer}.weight" in weights:
            raise UnsupportedModelError(
                f"{folder} has quantised weights, and transformers does not read their scales "
                f"({name}); use the original model, or one that is quantised in another way"
            )


def _is_no_report(record: LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def refuse_unknown_layers(model: Any, hooked: Mapping[int, set[str]]) -> None:
    """Raise for a model whose attention or recurrent layers cannot run a tree."""
    if hooked:  # `Target` checks the attention of hybrid models when it replaces it
        return
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if kinds & RECURRENT_LAYERS:
        raise UnsupportedModelError(refusal(model.config.model_type))
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(refusal(model.config.model_type, FIXED_ATTENTION))


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """Return the layers of a decoder-only model, first to last; raise for other models."""
    layers: Sequence[nn.Module] | None = getattr(model.get_decoder(), "layers", None)
    if not layers:
        raise UnsupportedModelError(
            refusal(model.config.model_type, "their decoder does not keep its layers as `layers`")
        )
    return layers


def layer_spans(layers: Sequence[nn.Module]) -> list[Span]:
    """List devices with their numbers of consecutive layers.

    Raises a ConfigError if a layer is not on a GPU.
    """
    devices = [next(layer.parameters()).device for layer in layers]
    if any(device.type in ("cpu", "meta") for device in devices):
        raise ConfigError(
            "the target does not fit into the GPUs, and device_map cannot place layers on the "
            "CPU; choose a quantised target"
        )
    return [(device, len(list(group))) for device, group in groupby(devices)]


def follow_devices(model: Any, layers: Sequence[nn.Module], home: torch.device) -> None:
    """Let every module take its inputs to its device, and the last modules their outputs home.

    They replace accelerate's hooks; `home` is the device of the embeddings.
    """
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import send_to_device

    def take_inputs(device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        # Contexts know masks by their identity, and move them themselves.
        kept = MASK if is_attending() else None
        return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=kept)

    remove_hook_from_module(model, recurse=True)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    last = [x for x in decoder.children() if x not in (*layers, model.get_input_embeddings())]
    last = [x for x in [*last, head] if next(x.parameters(), None) is not None]
    for module in (*layers, *last):
        device = next(module.parameters()).device
        module.register_forward_pre_hook(partial(take_inputs, device), with_kwargs=True)
    for module in last:
        module.register_forward_hook(lambda _, __, output: output.to(home))


def join_ranks(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be split between the processes of `torchrun`."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather().detach()


def whole_output_head(head: Any) -> nn.Module:
    """Return a copy of the output head that one process can use alone, for its drafter."""
    tensors = {name: join_ranks(x) for name, x in head.named_parameters()}
    vocab_size, hidden_size = tensors["weight"].shape
    with torch.device("meta"):
        copy = nn.Linear(hidden_size, vocab_size, "bias" in tensors)
    copy.load_state_dict(tensors, assign=True)
    return copy.requires_grad_(False)


@torch.no_grad()
def add_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Merge a LoRA adapter into a model, computed in float32; see `merge_adapter` for errors."""
    embeddings = model.get_input_embeddings().weight

    def problem(module: Any) -> str | None:
        if type(module) is not nn.Linear or not module.weight.is_floating_point():
            return "it is quantised, or no linear layer; dequantise the target"
        if module.weight is embeddings:
            return SHARED_WEIGHT
        return None

    def add(module: Any, update: NDArray[np.float32]) -> None:
        weight = module.weight
        merged = weight.float() + torch.from_numpy(update).to(weight.device)
        module.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=False)

    merge_adapter(folder, dict(model.named_modules()), problem, add)


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Give a model its own attention back at the end, whatever replaced it inside."""
    implementation = attention_implementation(model.config)
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def attention_implementation(config: Any) -> Any:
    """Return the name of a model's attention; a dictionary of names if it has parts."""
    parts = {name: getattr(config, name) for name in config.sub_configs}
    own: str = config._attn_implementation
    names = {name: attention_implementation(part) for name, part in parts.items() if part}
    return {"": own, **names} if names else own


def tree_attention(config: Any) -> Any:
    """Return the names, as `attention_implementation` does, with which a decoder runs trees."""
    is_known = isinstance(image_family(config.model_type, "cuda"), ImageFamily)
    if not is_known or config.get_text_config() is config:
        return IMPLEMENTATION
    own, text = attention_implementation(config), config.get_text_config()
    decoder = {name: IMPLEMENTATION for name in config.sub_configs if getattr(config, name) is text}
    return {**own, "": IMPLEMENTATION, **decoder}


class ModelTarget(ModelPasses):
    """A model of transformers, whose attention is replaced."""

    def __init__(
        self,
        model: PreTrainedModel,  # loaded, for inference
        device: torch.device,  # the device of its embeddings, and of its inputs and outputs
        *,
        pack: bool,  # pack the weights on a CPU; the model is then for inference only
        kv_bits: int | None = None,  # bits of stored keys and values; None does not quantise them
        split: bool = False,  # whether other processes have parts of its layers
        placed: bool = False,  # whether its layers are on several devices
    ) -> None:
        """Replace the attention of a model.

        Raises a ConfigError if the model cannot be placed or quantised in this way, and an
        UnsupportedModelError if the model cannot run a draft tree.
        """
        refuse_stateful(model.config)
        hooked = hook_recurrent_layers(model)
        refuse_unknown_layers(model, hooked)
        layers, spans = decoder_layers(model), None
        if split and hooked:  # the other ranks would have to keep its states as well
            raise ConfigError("torchrun is not supported for models with recurrent layers")
        if placed:
            if hooked:
                raise ConfigError("device_map is not supported for models with recurrent layers")
            spans = layer_spans(layers)
            follow_devices(model, layers, device)
        super().__init__(model.config.get_text_config(), device, layers, spans)
        self.model = model  # model whose attention was replaced
        self.layers_from = "transformers"
        self.is_hybrid, self.split = bool(hooked), split
        self.attention_slots = {}
        # The recurrent layers whose states have values before keys.
        self.transposed_layers = frozenset(n for n, names in hooked.items() if MAMBA_2 in names)
        table = model.get_input_embeddings()
        is_packed_table = isinstance(table, LowBitEmbedding)
        self.embeddings = table if is_packed_table else join_ranks(table.weight)
        self.dtype = self.embeddings.dtype
        self.lm_head = model.get_output_embeddings()
        if split:
            self.lm_head = whole_output_head(self.lm_head)
        weight = getattr(self.lm_head, "weight", None)
        if isinstance(self.lm_head, LowBitLinear):
            weight = self.lm_head
        elif weight is not None and (
            is_subclass(weight)  # torchao's quantised weights keep their dtype
            or (weight.dtype, weight.device) != (self.dtype, device)
        ):
            weight = None
        self.lm_head_weight = weight
        self.scale = 1.0  # factor of the model on its output head's logits; `find_scale` finds it
        self.hooks = ExitStack()  # closing it removes the hooks of `capture`
        parameters = inspect.signature(type(model).forward).parameters
        self.cache_argument = next((x for x in CACHES if x in parameters), "past_key_values")
        self.type_arguments = [name for name in TOKEN_TYPES if name in parameters]
        self._replace_attention(pack, kv_bits)

    @classmethod
    def load(
        cls,
        folder: Path,  # the folder of the checkpoint
        config: PreTrainedConfig,  # configuration in the folder
        device: torch.device,  # for the weights
        dtype: torch.dtype | None,  # None is the checkpoint's own
        settings: LoadConfig,  # for what is loaded, and how it is stored and placed
        processor: Processor | str,  # see `images.find_processor`
        *,
        pack: bool,
        processes: int = 1,  # processes of `torchrun`; each loads its part of every layer
    ) -> ModelTarget:
        """Load the model of a folder, and replace its attention.

        Raises:
            CheckpointError: the folder is damaged or incomplete.
            ConfigError, UnsupportedModelError: as the constructor raises them.
        """
        on_cpu = device.type == "cpu"
        if is_packed(config):
            config.quantization_config["dequantise"] = settings.bits == UNPACKED_BITS
        elif not settings.bits and settings.exact and pack and keeps_bits(folder, on_cpu):
            config.quantization_config = LowBitConfig.of_folder(folder, config)
        split, placed = processes > 1, settings.device_map is not None
        model = load_model(
            folder,
            config,
            dtype,
            device,
            processes=processes,
            device_map=settings.device_map,
            images=not isinstance(processor, str),
        )
        if settings.adapter:
            add_adapter(model, Path(settings.adapter))
        if settings.bits not in (None, UNPACKED_BITS):
            pack_linears(model, [rounding(settings.bits)])
        samples: Sequence[ImageSample] = ()
        if isinstance(processor, Processor):
            try:
                samples = run_samples(model, processor)
            except Exception as error:  # the model's own code, or its processor's
                if is_out_of_memory(error) or is_device_lost(error):
                    raise
                processor = f"transformers cannot run an image ({first_line(error)})"
        tower = VisionTower(model) if has_tower(model) else None
        kv_bits = settings.kv_bits
        target = cls(model, device, pack=pack, kv_bits=kv_bits, split=split, placed=placed)
        target.processor, target.samples = processor, samples
        target.tower = tower if samples else None
        return target

    def _replace_attention(self, pack: bool, kv_bits: int | None) -> None:
        """Replace the model's attention, and check that its logits on a short prompt stay equal.

        Raises a CheckpointError if the model itself cannot run, a ConfigError if the keys and
        values cannot be quantised, and an UnsupportedModelError if the logits differ, so the model
        computes attention in a way that the replacement does not.
        """
        family = self.model.config.model_type
        tokens = torch.arange(CHECKED_TOKENS, device=self.device) % self.vocab_size
        with torch.inference_mode():
            try:
                expected = self.model(tokens[None], use_cache=False, logits_to_keep=1).logits[0]
            except Exception as error:  # the model's own code, for settings that do not fit
                if is_out_of_memory(error) or is_device_lost(error):
                    raise
                raise CheckpointError(
                    f"transformers cannot run {self.model.name_or_path} with the settings of its "
                    f"config.json: {first_line(error)}"
                ) from error
            self.model.set_attn_implementation(tree_attention(self.model.config))
            if pack and self.device.type == "cpu":
                pack_linears(self.model)
                self.lm_head = self.model.get_output_embeddings()
            state = State(self.arena, None, CHECKED_TOKENS, recurrent=self.new_recurrent_states())
            cache = self.new_cache([(state, range(CHECKED_TOKENS))], [None])
            positions = torch.arange(len(tokens), device=self.device)
            context = _ExaminedAttention([TokenBlock(0, positions, None)], cache)
            of_version = f"treeflash does not know these layers of transformers {version}"
            try:
                with errors_of_model("treeflash_cuda", of_version):
                    actual, _ = self.forward(tokens, context, cache, logits_to_keep=1)
            except UnsupportedModelError as error:  # it names no family
                raise UnsupportedModelError(refusal(family, str(error))) from error
            if isinstance(cache, HybridCache):
                state.restore_recurrent(cache.parts[0].writes.states_after(tokens))
                committed = state.recurrent_states()
                assert committed is not None
                self.state_arena = StateArena(committed, self.transposed_layers)
                self.states_nbytes = arrays_nbytes(state.recurrent_arrays())
            if kv_bits is not None and self.arena.like is not None:
                check_quantisation(self.arena.like.shape[3], family)
            # Recurrent layers need no room in it.
            layers = len(self.attention_slots) if self.is_hybrid else self.arena.layers
            self.arena = self.arena.resized(layers, self.dtype if kv_bits else None)
            state.close()
        self.softcap, self.has_sinks = context.softcap, context.has_sinks
        self.reads_cache = context.reads_cache
        if context.layers < len(self.attention_slots):
            raise UnsupportedModelError(refusal(family, FIXED_ATTENTION))
        if difference := self._significant_difference(actual, expected):
            raise UnsupportedModelError(
                f"{family} models compute attention in a way that the cuda backend does not "
                f"support (relative error of the logits: {difference:.2f})"
            )

    def make_exact(self, passed: PassedChecks) -> None:
        if self.is_hybrid:
            raise UnsupportedModelError(f"{INEXACT}: it does not support recurrent layers")
        if not self.reads_cache:
            raise UnsupportedModelError(f"{INEXACT}: layers change what they have stored")
        if self.operations is not None:
            if self.operations.fallbacks:
                raise UnsupportedModelError(f"{INEXACT}: {self.operations.fallbacks[0]}")
            self.prompt_attention = None
        with torch.inference_mode():
            if self.operations is not None:
                use_kernel_for_products(self.model)
                check_products(self.model, self.dtype)
            else:
                if self.softcap is not None:
                    raise UnsupportedModelError(
                        f"{INEXACT}: it does not support soft-capped scores"
                    )
                if self.has_sinks:
                    raise UnsupportedModelError(f"{INEXACT}: it does not support attention sinks")
                self._change(token_rows=token_rows(self.model, self.dtype))
                bound_products(self.model, self.dtype, self._exact_changes, passed)
                pack_activations(self.model, self.dtype, self._exact_changes)
                check_activations(self.model, self.dtype)
                assert self.arena.like is not None
                _, kv_heads, _, width = self.arena.like.shape
                check_attention(self.config.num_attention_heads, kv_heads, width)
                self._change(arena=self.arena.widened())
        self.is_exact = True

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Replace the attention of a model that has its own attention otherwise; see `wrap`."""
        borrowed = nullcontext() if self.threads is None else self.threads.borrowed()
        with borrowed, own_attention(self.model), self.hooks:
            self.model.set_attn_implementation(tree_attention(self.model.config))
            self.capture(self.captured)
            yield

    def find_scale(self) -> None:
        """Find `scale`, so that `logits` needs only the output head.

        Raises an UnsupportedModelError if the model does more to its logits than multiply them.
        """
        tokens = torch.arange(CHECKED_TOKENS, device=self.device) % self.vocab_size
        context = MaskedContext.whole_sequence(len(tokens), self.device)
        with torch.inference_mode(), attention_context(context):
            expected = self.model(tokens[None], use_cache=False).logits.float()
            raw = self.lm_head(self.run_decoder(tokens[None], context)[0]).float()
        self.scale = float((expected * raw).sum() / raw.square().sum())
        if difference := self._significant_difference(self.scale * raw, expected):
            raise UnsupportedModelError(
                f"{self.model.config.model_type} models do more than multiply the logits of their "
                f"output head by a factor (relative error {difference:.2f}), so drafters cannot be "
                "trained for them"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the model's (..., vocab) logits from its decoder's (..., hidden_size)."""
        raw = self.lm_head(hidden)
        return raw if self.scale == 1 else raw * self.scale

    def _significant_difference(self, actual: Tensor, expected: Tensor) -> float:
        """Return the relative error of logits; 0 if other kernels could cause it.

        It is infinite if one of them is not finite that should be.
        """
        if (expected.isfinite() & ~actual.isfinite()).any():
            return torch.inf  # no comparison with NaN finds a difference
        difference = float((actual - expected).float().std() / expected.float().std())
        # Products with weights of few bits round their input to 8 bits.
        rounds = any(isinstance(x, LowBitLinear) for x in self.model.modules())
        tolerance = TOLERANCES["bfloat16" if rounds else str(self.dtype).removeprefix("torch.")]
        return difference if difference > TOLERANCE_FACTOR * tolerance else 0

    def capture(self, layer_ids: Sequence[int]) -> None:
        self.hooks.close()
        self.captured = tuple(layer_ids)
        for layer_id in layer_ids:
            # A model may add features of images between two layers.
            if layer_id == -1 or (self.tower is not None and layer_id < len(self.layers) - 1):
                handle = self.layers[layer_id + 1].register_forward_pre_hook(
                    partial(_capture_input, layer_id), with_kwargs=True
                )
            else:
                is_norm = layer_id == len(self.layers)
                module = self.model.get_decoder() if is_norm else self.layers[layer_id]
                handle = module.register_forward_hook(partial(_capture_output, layer_id))
            self.hooks.enter_context(handle)

    def run_decoder(
        self, tokens: Tensor, context: MaskedContext
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run (rows, n) tokens: (rows, n, hidden_size) of the decoder and of captured layers."""
        positions = context.positions.expand(len(tokens), -1)
        with attention_context(context) as outputs:
            decoder = self.model.get_decoder()
            output = decoder(input_ids=tokens, position_ids=positions, use_cache=False)
        return output.last_hidden_state, outputs

    def new_recurrent_states(self) -> RecurrentStates | None:
        return RecurrentStates(self.transposed_layers) if self.is_hybrid else None


def _capture_output(layer_id: int, _: nn.Module, __: Any, output: Any) -> None:
    capture_output(layer_id, output if isinstance(output, Tensor) else output[0])


def _capture_input(layer_id: int, _: nn.Module, args: Any, kwargs: Any) -> None:
    capture_output(layer_id, args[0] if args else kwargs["hidden_states"])


class _ExaminedAttention(MaskedContext):
    """Counts the attention layers that it serves, and notes what they attend to and how."""

    layers = 0
    softcap: float | None = None
    has_sinks = False
    reads_cache = True

    def attend(self, inputs: AttentionInputs) -> Tensor:
        self.layers += 1
        self.softcap = inputs.softcap if inputs.softcap is not None else self.softcap
        self.has_sinks |= inputs.sinks is not None
        assert self.cache is not None
        stored_by = {self.cache.stored_by(x) for x in (inputs.key, inputs.value)}
        self.reads_cache &= None not in stored_by and len(stored_by) == 1
        return super().attend(inputs)
