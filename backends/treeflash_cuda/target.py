"""A Hugging Face causal language model, loaded unmodified, that runs draft trees."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from treeflash.decoding.probe import TOLERANCES
from treeflash.drafters.folder import read_config, weight_files
from treeflash.errors import CheckpointError, UnsupportedModelError, is_out_of_memory
from treeflash_cuda.attention import NAME, Visibility, looking
from treeflash_cuda.cache import TargetCache
from treeflash_cuda.linear import IN_TARGET, join_linears, pack_linears, take

CHECKED_TOKENS = 16
# Other kernels round otherwise, and in half precision may route a token to other experts.
LOOSER = 5
TREE_LAYERS = {"full_attention", "sliding_attention"}


class Target:
    """The model, and the outputs of the layers that a drafter reads.

    Attributes:
        embeddings: (vocab, hidden_size) the raw input table.
        output: the output head, hidden_size to vocab.
        output_weight: (vocab, hidden_size) of it.
        max_positions: up to which positions are what they are in plain text, whatever else is run.
        scale: by which the model multiplies what its output head says; `find_scale` finds it.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype | None) -> None:
        """Load a folder; `dtype` None is the checkpoint's own.

        Raises:
            CheckpointError: the folder is damaged or incomplete.
            UnsupportedModelError: a family that cannot run a draft tree.
        """
        config = _read_config(folder)
        refuse_stateful(config)
        self.model = _load_model(folder, config, dtype, device).eval()
        refuse_foreign_attention(self.model)
        self.config = config.get_text_config()
        self.device = device
        self.dtype: torch.dtype = self.model.dtype
        self.layers = decoder_layers(self.model)
        self.embeddings: Tensor = self.model.get_input_embeddings().weight
        self.output: nn.Module = self.model.get_output_embeddings()
        self.output_weight: Tensor = self.output.weight
        self.vocab_size = len(self.embeddings)
        self.max_positions = _max_positions(self.config)
        self.scale = 1.0
        # transformers 5.24 renames the argument, and warns of the old name at every call.
        parameters = inspect.signature(type(self.model).forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._captured: dict[int, Tensor] = {}

    def prepare(self, *, pack: bool) -> None:
        """Take over attention, and check on a short text that the model computes what it did.

        Args:
            pack: for inference alone: lay the weights out for the device; no gradient flows then.

        Raises:
            UnsupportedModelError: they differ; the model does more than it asks attention for.
        """
        tokens = torch.arange(CHECKED_TOKENS, device=self.device) % self.vocab_size
        visibility = Visibility.whole(len(tokens), self.device)
        with torch.inference_mode():
            theirs = self.model(tokens[None], use_cache=False, logits_to_keep=1).logits[0]
            self.model.set_attn_implementation(NAME)
            if pack:
                join_linears(self.model, IN_TARGET)
                pack_linears(self.model)
                self.output = self.model.get_output_embeddings()
            mine, _ = self.forward(tokens, visibility, self.new_cache(), last_only=True)
        difference = float((mine - theirs).float().std() / theirs.float().std())
        if difference > LOOSER * TOLERANCES[str(self.dtype).removeprefix("torch.")]:
            raise UnsupportedModelError(
                f"{self.model.config.model_type} models compute attention in a way of their own, "
                f"which the cuda backend does not do (logits differ by {difference:.1%})"
            )

    def find_scale(self) -> None:
        """Prepare for `logits`, which does without the rest of the model.

        Raises:
            UnsupportedModelError: the model does more to its logits than to multiply them.
        """
        tokens = torch.arange(CHECKED_TOKENS, device=self.device) % self.vocab_size
        visibility = Visibility.whole(len(tokens), self.device)
        parts = (self.model, self.model.get_decoder())
        with torch.inference_mode(), looking(visibility):
            whole, decoded = (
                part(tokens[None], position_ids=visibility.positions[None], use_cache=False)
                for part in parts
            )
            theirs, raw = whole.logits.float(), self.output(decoded.last_hidden_state).float()
        self.take_captured()
        self.scale = float((theirs * raw).sum() / raw.square().sum())
        difference = float((theirs - self.scale * raw).std() / theirs.std())
        if difference > LOOSER * TOLERANCES[str(self.dtype).removeprefix("torch.")]:
            raise UnsupportedModelError(
                f"{self.model.config.model_type} models do more than multiply what their output "
                f"head says (it differs by {difference:.1%}), and cannot be trained for"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., vocab) of (..., hidden_size) outputs of the decoder."""
        raw: Tensor = self.output(hidden)
        return raw if self.scale == 1 else raw * self.scale

    def capture(self, layer_ids: Sequence[int]) -> None:
        """Keep these layers' outputs at every forward from now on."""

        def keep(layer_id: int) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                self._captured[layer_id] = output[0] if isinstance(output, tuple) else output

            return hook

        for layer_id in layer_ids:
            self.layers[layer_id].register_forward_hook(keep(layer_id))

    def output_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(n, t) logits of some tokens, from (n, hidden_size) and (t,) ids."""
        bias = getattr(self.output, "bias", None)
        weight = take(self.output_weight, tokens)
        return F.linear(hidden, weight, None if bias is None else bias[tokens])

    def new_cache(self) -> TargetCache:
        """An empty cache for a text."""
        return TargetCache(len(self.layers))

    def forward(
        self, token_ids: Tensor, visibility: Visibility, cache: TargetCache, last_only: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run n tokens after the committed ones.

        Args:
            token_ids: (n,).
            visibility: their positions, and what they see.
            cache: holds their keys and values afterwards, not committed.
            last_only: whether only the last token's logits are wanted.

        Returns:
            (n or 1, vocab) logits; (n, hidden_size) outputs of the captured layers.
        """
        with looking(visibility):
            output = self.model(
                input_ids=token_ids[None],
                position_ids=visibility.positions[None],
                use_cache=True,
                logits_to_keep=1 if last_only else 0,
                **{self.cache_argument: cache},
            )
        return output.logits[0], {i: hidden[0] for i, hidden in self.take_captured().items()}

    def take_captured(self) -> dict[int, Tensor]:
        """(batch, n, hidden_size) outputs of the last forward, by layer."""
        captured, self._captured = self._captured, {}
        return captured


def refuse_stateful(config: PreTrainedConfig) -> None:
    """Raise for layers that keep more than keys and values, or that attend in chunks."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - TREE_LAYERS
    if kinds:
        raise UnsupportedModelError(
            f"{config.model_type} has {', '.join(sorted(kinds))} layers, which cannot run a "
            "draft tree"
        )


def refuse_foreign_attention(model: Any) -> None:
    """Raise for a model that does its attention its own way."""
    stateful = getattr(model, "_is_stateful", False)
    if stateful or not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{model.config.model_type} models cannot run a draft tree: their layers "
            + ("keep a recurrent state" if stateful else "do not take another attention")
        )


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The layers of a decoder-only model, first to last; raise for another kind of model."""
    layers: Sequence[nn.Module] | None = getattr(model.get_decoder(), "layers", None)
    if not layers:
        raise UnsupportedModelError(
            f"{model.config.model_type} models cannot run a draft tree: they have no decoder layers"
        )
    return layers


def _read_config(folder: Path) -> PreTrainedConfig:
    read_config(folder)  # says clearly what is wrong with a damaged file
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is not usable: {_first_line(error)}"
        ) from error


def _load_model(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype | None, device: torch.device
) -> Any:
    weight_files(folder)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model = model.to(device)
    except ImportError as error:
        raise UnsupportedModelError(
            f"{folder} needs a package that is not installed ({_first_line(error)}); pass weights "
            "that are not quantised"
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder} lacks the tensor {missing[0]}")
    return model


def _max_positions(config: Any) -> int:
    """Positions of the target, or fewer where those beyond would change all others' rotation."""
    rope = getattr(config, "rope_parameters", None) or {}
    for part in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        # transformers takes the long frequencies for whole forwards, by their last position.
        if part.get("rope_type") == "longrope":
            return int(part["original_max_position_embeddings"])
    return int(config.max_position_embeddings)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
