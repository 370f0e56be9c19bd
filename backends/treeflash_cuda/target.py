"""A Hugging Face causal language model, loaded unmodified, that runs draft trees."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeflash.decoding.probe import TOLERANCES
from treeflash.decoding.recurrence import refusal
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError, UnsupportedModelError
from treeflash_cuda.arena import Arena, Span, check_quantisation
from treeflash_cuda.attention import (
    IMPLEMENTATION,
    AttentionContext,
    Context,
    attention_context,
)
from treeflash_cuda.attention_kernels import Kernels
from treeflash_cuda.cache import TreeCache
from treeflash_cuda.cascade import CascadeContext
from treeflash_cuda.graphs import Graphs
from treeflash_cuda.hybrid_cache import HybridCache
from treeflash_cuda.hybrid_hooks import MAMBA_2, hook_recurrent_layers
from treeflash_cuda.layers import (
    capture_layers,
    decoder_layers,
    refuse_stateful,
    refuse_unknown_layers,
)
from treeflash_cuda.linear import IN_TARGET, fuse_linears, pack_linears, take
from treeflash_cuda.loading import load_model, max_positions, read_model_config
from treeflash_cuda.placement import follow_devices, spans_of
from treeflash_cuda.ranks import whole, whole_output_head
from treeflash_cuda.state import State

CHECKED_TOKENS = 16
# Other kernels round differently, and in half precision may route a token to other experts.
TOLERANCE_FACTOR = 5


class Target:
    """The model, and the outputs of the layers that a drafter reads.

    Attributes:
        embeddings: (vocab, hidden_size) the input table, without any scaling by the model.
        lm_head: the output head, hidden_size to vocab.
        lm_head_weight: (vocab, hidden_size) its weight; None if it is quantised, or elsewhere.
        max_positions: positions of the model; fewer if later ones would change earlier ones.
        scale: factor of the model on its output head's logits; `find_scale` finds it.
        kernels: for attention in parts; None computes it as a whole, with a mask.
        transposed: recurrent layers whose states have values before keys; None without recurrent
            layers.
        states_nbytes: size of a text's recurrent states, bytes.
        graphs: replay forward passes, if they are enabled.
        split: whether other processes have parts of the layers.
        spans: devices, and how many layers in a row each one has; None for one device.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype | None,
        *,
        split: bool = False,
        device_map: str | None = None,
    ) -> None:
        """Load a folder.

        Args:
            folder: of the checkpoint.
            device: for the weights.
            dtype: None is the checkpoint's own.
            split: between the processes of `torchrun`, each of which loads its part.
            device_map: places the layers on several devices; see `LoadConfig.device_map`.

        Raises:
            CheckpointError: the folder is damaged or incomplete.
            UnsupportedModelError: the model cannot run a draft tree.
        """
        config = read_model_config(folder)
        refuse_stateful(config)
        self.model = load_model(folder, config, dtype, device, split=split, device_map=device_map)
        hooked = hook_recurrent_layers(self.model)
        refuse_unknown_layers(self.model, hooked)
        self.transposed: frozenset[int] | None = None
        if hooked:
            self.transposed = frozenset(n for n, names in hooked.items() if MAMBA_2 in names)
        self.attention_slots: dict[int, int] = {}
        self.states_nbytes = 0
        self.config = config.get_text_config()
        self.device = device
        self.layers = decoder_layers(self.model)
        self.spans: list[Span] | None = None
        if device_map is not None:
            if self.transposed is not None:
                raise ConfigError("models with recurrent layers have no --device-map; leave it out")
            self.spans = spans_of(self.layers)
            follow_devices(self.model, self.layers, device)
        self.embeddings: Tensor = whole(self.model.get_input_embeddings().weight)
        self.dtype: torch.dtype = self.embeddings.dtype
        self.lm_head: nn.Module = self.model.get_output_embeddings()
        self.split = split
        if split:
            self.lm_head = whole_output_head(self.lm_head)
        weight = getattr(self.lm_head, "weight", None)
        quantised = weight is None or weight.dtype != self.dtype or weight.device != device
        self.lm_head_weight: Tensor | None = None if quantised else weight
        self.vocab_size = len(self.embeddings)
        self.max_positions = max_positions(self.config)
        self.scale = 1.0
        self.kernels: Kernels | None = None
        self.graphs = Graphs(device)
        self.arena = Arena(len(self.layers), spans=self.spans)
        # transformers 5.24 renamed the argument, and warns about the old name at every call.
        parameters = inspect.signature(type(self.model).forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"

    def prepare(self, *, pack: bool, kv_bits: int | None = None) -> None:
        """Replace the model's attention, and check on a short text that its logits stay the same.

        Args:
            pack: pack the weights for the device; the model is then for inference only.
            kv_bits: of keys and values from then on; None keeps them as they are.

        Raises:
            ConfigError: its keys and values cannot be quantised.
            UnsupportedModelError: the logits differ, so the model computes attention in a way that
                the replacement does not.
        """
        tokens = torch.arange(CHECKED_TOKENS, device=self.device) % self.vocab_size
        context = _CountingContext(0, torch.arange(len(tokens), device=self.device), None)
        with torch.inference_mode():
            expected = self.model(tokens[None], use_cache=False, logits_to_keep=1).logits[0]
            self.model.set_attn_implementation(IMPLEMENTATION)
            if pack:
                fuse_linears(self.model, IN_TARGET)
                pack_linears(self.model)
                self.lm_head = self.model.get_output_embeddings()
            text = State(self.arena, None, CHECKED_TOKENS, transposed=self.transposed)
            cache = self.new_cache([(text, range(CHECKED_TOKENS))], [None])
            try:
                actual, _ = self.forward(tokens, context, cache, logits_to_keep=1)
            except UnsupportedModelError as error:  # of a layer, which does not know the model
                raise UnsupportedModelError(
                    refusal(self.model.config.model_type, str(error))
                ) from error
            if text.recurrent is not None:
                text.recurrent.go_on(text.recurrent.after(tokens))
                self.states_nbytes = text.recurrent.nbytes
            # Recurrent layers need no room in it.
            layers = self.arena.layers if self.transposed is None else len(self.attention_slots)
            if kv_bits is not None:
                check_quantisation(kv_bits, text.key_values.region, self.model.config.model_type)
            dtype = None if kv_bits is None else self.dtype
            self.arena = self.arena.resized(layers, text.key_values.region, dtype)
            text.close()
        if context.layers < len(self.attention_slots):
            reason = "their attention layers do not support other attention functions"
            raise UnsupportedModelError(refusal(self.model.config.model_type, reason))
        difference = float((actual - expected).float().std() / expected.float().std())
        if difference > TOLERANCE_FACTOR * TOLERANCES[str(self.dtype).removeprefix("torch.")]:
            raise UnsupportedModelError(
                f"{self.model.config.model_type} models compute attention in a way that the cuda "
                f"backend does not support (logits differ by {difference:.1%})"
            )

    def find_scale(self) -> None:
        """Find `scale`, so that `logits` needs only the output head.

        Raises:
            UnsupportedModelError: the model does more to its logits than multiply them.
        """
        tokens = torch.arange(CHECKED_TOKENS, device=self.device) % self.vocab_size
        context = AttentionContext.whole_text(len(tokens), self.device)
        parts = (self.model, self.model.get_decoder())
        with torch.inference_mode(), attention_context(context):
            whole, decoded = (
                part(tokens[None], position_ids=context.positions[None], use_cache=False)
                for part in parts
            )
            expected = whole.logits.float()
            raw = self.output_head(decoded.last_hidden_state).float()
        self.scale = float((expected * raw).sum() / raw.square().sum())
        difference = float((expected - self.scale * raw).std() / expected.std())
        if difference > TOLERANCE_FACTOR * TOLERANCES[str(self.dtype).removeprefix("torch.")]:
            raise UnsupportedModelError(
                f"{self.model.config.model_type} models do more than multiply the logits of their "
                f"output head by a factor (they differ by {difference:.1%}), so drafters cannot be "
                "trained for them"
            )

    def capture(self, layer_ids: Sequence[int]) -> None:
        """Return these layers' outputs from every forward pass from now on; -1: the embeddings'."""
        capture_layers(self.layers, layer_ids)

    def embed(self, tokens: Tensor) -> Tensor:
        """(..., hidden_size) rows of the input table."""
        return F.embedding(tokens, self.embeddings)

    def output_head(self, hidden: Tensor) -> Tensor:
        """(..., vocab) logits of the output head alone, from (..., hidden_size)."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., vocab) logits of the model, from (..., hidden_size) outputs of its decoder."""
        raw = self.output_head(hidden)
        return raw if self.scale == 1 else raw * self.scale

    def shortlist_logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(n, t) logits of some tokens, from (n, hidden_size) and (t,) ids."""
        if self.lm_head_weight is None:
            return self.output_head(hidden).index_select(-1, tokens)
        bias = getattr(self.lm_head, "bias", None)
        weight = take(self.lm_head_weight, tokens)
        return F.linear(hidden, weight, None if bias is None else bias[tokens])

    def context(
        self, committed: int, positions: Tensor, ancestors: Tensor | None
    ) -> AttentionContext:
        """What a block of tokens sees; see `AttentionContext`."""
        if self.kernels is None:
            return AttentionContext(committed, positions, ancestors)
        return CascadeContext(committed, positions, ancestors, self.kernels)

    def new_cache(
        self, rows: Sequence[tuple[State, Any]], ancestors: Sequence[Tensor | None]
    ) -> TreeCache:
        """The cache of a forward pass.

        Args:
            rows: texts, and the tree or the next tokens of each.
            ancestors: of the trees; None for next tokens.
        """
        key_values = [state.key_values for state, _ in rows]
        sizes = [len(tokens) for _, tokens in rows]
        states = [state.recurrent for state, _ in rows if state.recurrent is not None]
        if self.transposed is None:
            return TreeCache(key_values, sizes)
        trees = [tokens if isinstance(tokens, DraftTree) else None for _, tokens in rows]
        slots, device = self.attention_slots, self.device
        return HybridCache(key_values, states, trees, ancestors, sizes, slots, device)

    def forward(
        self,
        token_ids: Tensor,
        context: Context,
        cache: TreeCache,
        *,
        logits_to_keep: int | Tensor,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run n tokens after the committed ones.

        Args:
            token_ids: (n,).
            context: their positions, and what they see.
            cache: holds their keys and values afterwards, uncommitted.
            logits_to_keep: rows whose logits to compute: so many of the last, 0 for all, or an
                index.

        Returns:
            Logits of those rows; (n, hidden_size) outputs of the captured layers, by index.
        """
        running = cache.running() if isinstance(cache, HybridCache) else nullcontext()
        with attention_context(context) as outputs, running:
            output = self.model(
                input_ids=token_ids[None],
                position_ids=context.positions[None],
                use_cache=True,
                logits_to_keep=logits_to_keep,
                **{self.cache_argument: cache},
            )
        return output.logits[0], {i: x[0].to(self.device) for i, x in outputs.items()}


class _CountingContext(AttentionContext):
    """Counts the attention layers that it serves."""

    layers = 0

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """See `Context.attend`."""
        self.layers += 1
        return super().attend(module, query, key, value, mask, scale)
