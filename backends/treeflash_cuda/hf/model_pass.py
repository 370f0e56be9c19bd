"""The passes of a model of transformers: over rows, or with masks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash_cuda.attention import TokenBlock
from treeflash_cuda.gpu.row_pass import RowInputs, RowTarget
from treeflash_cuda.gpu.tree_recurrences import TreeRecurrences
from treeflash_cuda.hf.attention_contexts import (
    Context,
    MaskedContext,
    TreeContext,
    attention_context,
)
from treeflash_cuda.hf.exact_contexts import ExactCache, ExactContext
from treeflash_cuda.hf.hybrid import HybridCache, HybridTreeCache, RecurrentCache
from treeflash_cuda.hf.model_caches import SlabCache, TreeCache
from treeflash_cuda.images import ImageRows
from treeflash_cuda.numerics import upload_all
from treeflash_cuda.recurrent_states import SequenceRows
from treeflash_cuda.sampling import Logits
from treeflash_cuda.state import State
from treeflash_cuda.target import Rows, RowsResult, last_rows, logit_counts

CHECKED_TOKENS = 16
"""Length of the prompts and trees on which the passes are tried at load."""


class ModelPasses(RowTarget):
    """The passes of a target that is a model of transformers; `ModelTarget` is the rest of it."""

    model: PreTrainedModel
    cache_argument: str  # the name of the model's argument for a cache
    type_arguments: Sequence[str]  # the names of the arguments for types of tokens
    attention_slots: dict[int, int]  # see `RecurrentCache.begin`
    # Whether layers attend to keys and values as they store them. If not, each sequence has a pass
    # of its own, which takes them from the layers.
    reads_cache = True
    has_row_pass = True  # whether all layers can run in it, which loading finds out

    def in_row_pass(self, state: State, tokens: DraftTree | Sequence[int]) -> bool:
        layers_can = self.has_row_pass and self.reads_cache
        return layers_can and super().in_row_pass(state, tokens)

    def choose_passes(self) -> None:
        """Let trees run with masks if a layer cannot run in the pass over rows.

        A tree finds it out. Raises an UnsupportedModelError in exact mode, because the other passes
        have other bits. Without operations all passes have masks.
        """
        if self.operations is None or not self.operations.runs_trees or not self.reads_cache:
            return
        try:
            self.run_tree(CHECKED_TOKENS)
        except UnsupportedModelError as error:
            if self.is_exact:
                raise
            self.has_row_pass = False
            warnings.warn(f"draft trees run without CUDA graphs: {error}", stacklevel=2)

    def compute(self, rows: RowInputs) -> tuple[Tensor, dict[int, Tensor], Sequence[Tensor]]:
        assert self.operations is not None
        storage = rows.slab, self.arena.encode, rows.slots.long()
        cache, recurrences = SlabCache(*storage), None
        if rows.recurrent is not None:
            assert self.state_arena is not None
            nodes, states = rows.recurrent
            recurrences = TreeRecurrences(self.operations, self.state_arena, states, nodes)
            cache = HybridTreeCache(*storage, self.attention_slots, recurrences)
        context = TreeContext(self.operations, cache, rows.keys, rows.positions.long())
        logits, outputs = self.forward(
            rows.ids.long(), context, cache, logits_to_keep=0, rotary=rows.rotary.long()
        )
        return logits, outputs, [] if recurrences is None else recurrences.outputs()

    def group_others(self, rows: Sequence[Rows], members: Sequence[int]) -> Iterable[list[int]]:
        alone = [i for i in members if not self.reads_cache or rows[i][0].has_features(rows[i][1])]
        together = [i for i in members if i not in alone]
        return [*([i] for i in alone), *([together] if together else [])]

    def run_others(self, rows: Sequence[Rows], needs_logits: Sequence[bool]) -> RowsResult:
        """Run one pass, in which every sequence has its mask."""
        sizes = [len(tokens) for _, tokens in rows]
        arrays: list[NDArray[Any]] = []
        for state, tokens in rows:
            if isinstance(tokens, DraftTree):
                arrays += [tokens.tokens, tokens.positions(state.length), tokens.ancestor_mask()]
            else:
                arrays += [np.array(tokens), state.length + np.arange(len(tokens))]
        counts, ends = logit_counts(rows, needs_logits), np.cumsum(sizes)
        rows_to_keep = last_rows(sizes, counts)
        if turned := any(state.positions.shift or state.images for state, _ in rows):
            each = [state.rotary_positions(tokens) for state, tokens in rows]
            arrays.insert(0, np.concatenate(each, -1))
        uploaded = iter(upload_all([*arrays, rows_to_keep], self.device))
        rotary = next(uploaded).long() if turned else None
        tower, images = self.tower, None
        state, tokens = rows[0]
        if tower is not None and state.has_features(tokens):
            images = tower.rows(state, len(tokens))
        token_ids: list[Tensor] = []
        blocks: list[TokenBlock] = []
        for state, tokens in rows:
            token_ids.append(next(uploaded).long())
            positions = next(uploaded).long()
            ancestors = next(uploaded).bool() if isinstance(tokens, DraftTree) else None
            blocks.append(TokenBlock(state.length, positions, ancestors))
        cache = self.new_cache(rows, [block.ancestors for block in blocks])
        logits_to_keep: int | Tensor = 1  # transformers needs at least 1; the row is discarded
        if len(rows_to_keep) == ends[-1]:
            logits_to_keep = 0  # all
        elif len(rows_to_keep):
            logits_to_keep = next(uploaded).long()
        logits, outputs = self.forward(
            torch.cat(token_ids),
            self.context(blocks, cache, images),
            cache,
            logits_to_keep=logits_to_keep,
            rotary=rotary,
            images=images,
        )
        found = Logits.split(logits[: len(rows_to_keep)], counts)
        written = [x.writes for x in cache.parts] if isinstance(cache, HybridCache) else []
        firsts = (ends - sizes).tolist()
        return RowsResult.of_pass(found, rows, outputs, firsts, written=written)

    def context(
        self, blocks: Sequence[TokenBlock], cache: TreeCache, images: ImageRows | None = None
    ) -> MaskedContext | ExactContext:
        """Return the context of new tokens of one or several sequences, and of their cache."""
        if isinstance(cache, ExactCache):
            is_lone = len(blocks) == len(blocks[0]) == 1
            return ExactContext(blocks, cache, self.token_rows if is_lone else 1)
        # Tokens of an image that see each other need a mask.
        needs_mask = images is not None and images.types is not None
        return MaskedContext(blocks, cache, None if needs_mask else self.prompt_attention)

    def new_cache(
        self, rows: Sequence[tuple[State, Any]], ancestors: Sequence[Tensor | None]
    ) -> TreeCache:
        """Create the cache of a forward pass over trees, which have ancestors, and next tokens."""
        kv_caches = [state.kv_cache for state, _ in rows]
        if not self.is_hybrid:
            cache = ExactCache if self.is_exact and self.operations is None else TreeCache
            return cache(kv_caches, [len(tokens) for _, tokens in rows])
        parts, first = [], 0
        for (state, tokens), mask in zip(rows, ancestors, strict=True):
            assert state.recurrent is not None
            tree = tokens if isinstance(tokens, DraftTree) else None
            parts.append(SequenceRows(state.recurrent, first, len(tokens), tree, mask))
            first += len(tokens)
        return HybridCache(kv_caches, parts, self.attention_slots, self.device)

    def forward(
        self,
        token_ids: Tensor,
        context: Context,
        cache: TreeCache,
        *,
        logits_to_keep: int | Tensor,
        rotary: Tensor | None = None,
        images: ImageRows | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run (n,) tokens after the committed positions; the cache then holds them, uncommitted.

        The rotary positions are (n,), or (3, n) of three axes; None stands for the positions of the
        context. `images` are of a single sequence, whose tokens stand for features.

        Returns logits of the last `logits_to_keep` rows, of all for 0, or of those with these
        indices; and (n, hidden_size) outputs of the captured layers, by index.
        """
        rows = len(token_ids)
        if isinstance(context, ExactContext) and (times := context.repeats) > 1:
            token_ids = token_ids.repeat(times)
            rotary = None if rotary is None else rotary.repeat_interleave(times, -1)
            images = None if images is None else images.repeat(times)
        positions = context.positions if rotary is None else rotary
        inputs: dict[str, Any] = {self.cache_argument: cache}
        if images is not None:
            inputs["mm_encoder_outputs"] = {"image": images.features.output()}
            inputs |= dict.fromkeys(self.type_arguments, images.types)
        running = cache.running() if isinstance(cache, RecurrentCache) else nullcontext()
        with attention_context(context) as outputs, running:
            output = self.model(
                input_ids=token_ids[None],
                position_ids=positions.unsqueeze(-2),
                use_cache=True,
                logits_to_keep=logits_to_keep,
                **inputs,
            )
        return output.logits[0, :rows], {i: x[0].to(self.device) for i, x in outputs.items()}
