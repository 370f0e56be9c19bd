"""The tables of conditional heads, whose mathematics is in `treeflash.drafters.heads`.

The scores of a `ConditionalHead` depend on the slot and on one previous token. A `RecurrentCell`
has a state for the path of previous tokens, and `RecurrentHead` follows the paths depth by depth.
All scores are logits before the temperature.

`ARHead` computes the tables of all sequences together, although sequences may differ in the tokens
that are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.decoding import recurrent_head
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.recurrent_head import tables
from treeflash.decoding.transitions import RowBatch, TransitionTable
from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.formats import HEADS as FORMATS
from treeflash.drafters.heads import operations
from treeflash.drafters.heads.operations import ConditionalHead, Slots
from treeflash_cuda.drafter import Block, OutputStage, join_blocks
from treeflash_cuda.drafter_model import as_module, join, split
from treeflash_cuda.gpu.graphs import Outputs, power_of_four, power_of_two
from treeflash_cuda.linear import take, token_products
from treeflash_cuda.numerics import (
    largest,
    top_log_probs,
    topk,
    upload,
)

MANY = 1 << 30
"""Stands for no limit of a size."""


class ScoredTokens(operations.ScoredTokens):
    """The tokens that the children of (n,) rows are chosen from, with (slots, v) marginals.

    The tokens are (v,); or (blocks, v), with equally many queries in each block; or (slots, v) for
    a head with candidates.
    """

    def logits(self) -> Tensor:
        return take(self.marginals, self.rows).float()

    def output_logits(self, queries: Tensor) -> Tensor:
        return self.output.logits(queries, self.tokens)

    def products(self, queries: Tensor, table: nn.Embedding) -> Tensor:
        return token_products(queries, table.weight, self.tokens).float()

    def candidate_products(self, queries: Tensor, table: Tensor) -> Tensor:
        assert self.tokens is not None
        keys = table[take(self.tokens, self.rows)]
        return (keys.float() @ queries.float()[:, :, None])[..., 0]


HEAD_CLASSES: Mapping[str, Callable[[DrafterConfig, int, int], Any]] = {
    name: as_module(x.module) for name, x in FORMATS.items()
}
"""Modules by `DrafterConfig.head`, made of the configuration, I and the target's vocabulary."""
MIN_ROWS, MIN_SHORTLIST = 64, 1024
"""Smaller tables share a graph: reading the head's weights takes most of their time."""


def _rounded(options: TableOptions, vocab_size: int) -> TableOptions:
    """Round options up, so that tables share graphs; the extra rows and tokens are dropped."""
    rows, shortlist = options.rows, options.shortlist
    if shortlist is not None and max(options.m, options.k) <= shortlist < vocab_size:
        # The whole vocabulary would be no shortlist.
        shortlist = min(max(power_of_two(shortlist), MIN_SHORTLIST), vocab_size - 1)
    if rows is not None:
        rows = max(power_of_four(rows), MIN_ROWS)
    return replace(options, rows=rows, shortlist=shortlist)


class ChosenTokens(NamedTuple):
    """The tokens of tables."""

    marginals: Tensor  # (blocks, D, v) log probabilities
    # (blocks, v), or (slots, v) for a head with candidates; None for all tokens of the drafter.
    tokens: Tensor | None = None
    used: Tensor | None = None  # (blocks, v) whether a token is used; None uses all


class ARHead:
    """`treeflash.decoding.interfaces.ARHead` in PyTorch, for a head of one previous token."""

    def __init__(self, module: ConditionalHead, output: OutputStage) -> None:
        self.module, self.output = module, output

    @torch.inference_mode()
    def transitions(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:
        """Compute the products of all sequences together."""
        graphs, depths, limits = self.output.target.graphs, len(blocks[0].hidden), []
        noise, most = self.output.upload(options.noise), self.output.config.depths
        hidden, roots, noise, _ = join_blocks(blocks, noise, graphs, most)
        computed = replace(options, noise=None)
        if graphs.is_capturing:
            computed = _rounded(computed, self.output.vocab_size)
            sizes = depths, options.rows or MANY, options.shortlist or MANY
            limits.append(upload(np.array(sizes, np.int32), graphs.device))

        def search(hidden: Tensor, roots: Tensor, noise: Tensor, *limits: Tensor) -> Outputs:
            return self._search(hidden, roots, noise, computed, *limits)

        inputs = hidden, roots, noise, *limits
        results, m, k = graphs.run("the AR head", computed, search, *inputs)
        rows = 1 + min(options.rows or MANY, (depths - 1) * m)
        numbers = results.unflatten(0, (len(roots), -1)).cpu().numpy()[: len(blocks), :rows]
        floats = numbers[..., 2 + k :].view(np.float32)
        confidences = floats[..., k] if floats.shape[2] > k else None
        places, previous, tokens = numbers[:, 1:, 0], numbers[:, 1:, 1], numbers[..., 2 : 2 + k]
        rows_of_all = places, previous, tokens, floats[..., :k]
        return RowBatch(*rows_of_all, (depths, m), confidences).tables()

    @torch.inference_mode()
    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        slots = Slots.read(self.output, block.hidden)
        logits = self.output.logits(slots.normed)
        tokens = torch.from_numpy(previous).to(logits.device)
        queries = self.module.queries(slots, tokens, None)
        if self.module.candidates is None:
            scores = self.module.score(queries, ScoredTokens(self.output, logits, None, None))
            log_probs = scores.float().log_softmax(-1)
        else:
            marginals = logits.float().log_softmax(-1)
            mass, vocab = topk(marginals, self.module.candidates)
            scored = ScoredTokens(self.output, logits.gather(1, vocab), None, vocab)
            scores = self.module.score(queries, scored).log_softmax(-1)
            scores = scores + mass.logsumexp(-1, keepdim=True)
            log_probs = torch.full_like(marginals, -torch.inf).scatter(1, vocab, scores)
        return self.output.over_target_vocabulary(log_probs).cpu().numpy()

    def _search(
        self,
        hidden: Tensor,  # (blocks * D, hidden_size) outputs
        roots: Tensor,  # (blocks,)
        noise: Tensor,  # (blocks * D, 3) or (0, 3) of `OutputStage.upload`, added to the logits
        options: TableOptions,  # whose noise is not used
        # (3,) numbers of depths, rows and tokens of the shortlist, beyond which nothing is used;
        # None uses everything.
        limits: Tensor | None = None,
    ) -> Outputs:
        """Compute the numbers of tables with `m` rows per depth and `k` children per row.

        The int32 numbers are (blocks * n, 2 + 2 k), for one read from the device: the rows' places
        among all D * m rows, ascending, previous tokens, children, and log probabilities; then
        confidences, if the head predicts them. The rows that are used come first.
        """
        blocks = len(roots)
        slots = Slots.read(self.output, hidden)
        logits = self.output.logits(slots.normed)
        # Tokens are chosen by their marginals, so the whole output head is read, once for the slots
        # of all blocks, and all tokens are normalised: 10 MB for 16 slots of 151,936 tokens, 0.3 GB
        # for 32 blocks, where weights are 20 GB.
        marginals = self.output.noisy_log_probs(logits, noise, options.temperature)
        chosen = self._choose(marginals.unflatten(0, (blocks, -1)), options, limits)
        _, depths, size = chosen.marginals.shape
        m, vocab = min(options.m, size), chosen.tokens
        places, previous = self._rank(chosen, roots, m, options.rows, limits)
        block = torch.arange(blocks, device=hidden.device)[:, None]
        rows = ((places // m).clamp(max=depths - 1) + block * depths).flatten()
        queries = self.module.queries(slots, previous, rows)
        tokens = vocab
        if vocab is not None and len(vocab) == 1 and self.module.candidates is None:
            tokens = vocab[0]
        scored = ScoredTokens(self.output, _columns(logits, tokens), rows, tokens)
        scores = self.module.score(queries, scored)
        if (added := self.output.noise(noise, vocab)) is not None:
            scores = scores + take(added, rows)
        if chosen.used is not None:
            by_row = chosen.used.repeat_interleave(places.shape[1], 0, output_size=len(rows))
            scores = scores.masked_fill(~by_row, -torch.inf)
        children, log_probs = top_log_probs(scores, options.k, options.temperature)
        if vocab is not None:
            index = rows[:, None] if len(vocab) > blocks else block.expand_as(places).reshape(-1, 1)
            children = take(vocab.flatten(), (children + index * size).flatten())
            children = children.view(log_probs.shape).int()
            log_probs += take(chosen.marginals.logsumexp(-1).flatten(), rows)[:, None]
        children = self.output.to_target(children)
        ids = torch.stack([places.flatten(), previous], 1).int()
        parts = [ids, children, log_probs.view(torch.int32)]
        confidence = self.module.confidence(slots, previous, rows)
        if confidence is not None:
            parts.append(confidence[:, None].view(torch.int32))
        return torch.cat(parts, 1), m, children.shape[1]

    def _choose(
        self, marginals: Tensor, options: TableOptions, limits: Tensor | None
    ) -> ChosenTokens:
        """Choose the tokens that are scored by (blocks, D, Vd) marginals."""
        if self.module.candidates is not None:
            best, tokens = topk(marginals.flatten(0, 1), self.module.candidates)
            return ChosenTokens(best.unflatten(0, marginals.shape[:2]), tokens)
        if options.shortlist is None or options.shortlist >= marginals.shape[2]:
            return ChosenTokens(marginals)
        used = None
        if limits is None:
            tokens = largest(marginals.amax(1), options.shortlist)
        else:
            tokens, used = shortlist(marginals, options.shortlist, limits)
        marginals = marginals.gather(2, tokens[:, None].expand(-1, marginals.shape[1], -1))
        if used is not None:
            marginals = marginals.masked_fill(~used[:, None], -torch.inf)
        return ChosenTokens(marginals, tokens, used)

    def _rank(
        self,
        chosen: ChosenTokens,
        roots: Tensor,  # (blocks,)
        m: int,  # rows of a depth
        most: int | None,  # rows of a table besides the root's; None for all
        limits: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the (blocks, n) places of the rows with the likeliest previous tokens, ascending.

        Returns also these (blocks * n,) tokens, of which a block's first is its root.
        """
        blocks, depths, _ = chosen.marginals.shape
        weights, previous = topk(chosen.marginals[:, :-1].flatten(0, 1), m)
        weights, count = weights.view(blocks, -1), (depths - 1) * m
        if (tokens := chosen.tokens) is not None:
            if len(tokens) > blocks:
                tokens = tokens.unflatten(0, (blocks, -1))[:, :-1].flatten(0, 1)
            previous = tokens.gather(1, previous.view(len(tokens), -1))
        previous = self.output.to_target(previous.view(blocks, -1))
        if limits is not None:
            later = torch.arange(count, device=roots.device) >= (limits[0] - 1) * m
            weights = weights.masked_fill(later, -torch.inf)
        ranked = weights.argsort(dim=1, descending=True, stable=True)[:, :most]
        if limits is not None:  # after the others
            used_rows = torch.minimum(limits[1], (limits[0] - 1) * m)
            places = torch.arange(ranked.shape[1], device=roots.device)
            ranked = ranked.masked_fill(places >= used_rows, count)
        places = ranked.sort(1).values
        previous = previous.gather(1, places.clamp(max=count - 1))
        previous = torch.cat([roots[:, None].to(previous.dtype), previous], 1).flatten()
        return F.pad(places + m, (1, 0)), previous


def shortlist(marginals: Tensor, size: int, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Choose shortlists, (blocks, size) ascending tokens, from (blocks, D, Vd) marginals.

    Returns also (blocks, size) whether a token is used; see `ARHead._search` for the limits.
    """
    depths = torch.arange(marginals.shape[1], device=marginals.device)
    best = marginals.masked_fill((depths >= limits[0])[:, None], -torch.inf).amax(1)
    vocab, ranks = topk(best, size)[1].sort(1)
    return vocab, ranks < limits[2]


def _columns(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Select columns of (slots, Vd): (slots, v), as `ScoredTokens.tokens` gives them."""
    if tokens is None:
        return x
    if tokens.ndim == 1:
        return x.index_select(1, tokens)
    slots = len(x) // len(tokens)
    return x.gather(1, tokens if slots == 1 else tokens.repeat_interleave(slots, 0))


class RecurrentHead(recurrent_head.RecurrentHead):
    """`treeflash.decoding.interfaces.ARHead` in PyTorch, for a head with a state for each path."""

    output: OutputStage

    @torch.inference_mode()
    def transitions(self, blocks: Sequence[Block], options: TableOptions) -> list[TransitionTable]:
        """Follow the paths of all sequences together, to a power of two of depths for CUDA graphs.

        A step costs its own reads and launches, so that not all depths are computed.
        """
        graphs, wanted, limits = self.output.target.graphs, len(blocks[0].hidden), []
        width = options.m if options.rows is None else min(options.m, options.rows)
        computed = replace(options, noise=None, m=width, rows=None)
        most = min(power_of_two(wanted), self.output.config.depths)
        noise = self.output.upload(options.noise)
        outputs, roots, noise, depths = join_blocks(blocks, noise, graphs, most)
        if graphs.is_capturing:
            computed = _rounded(computed, self.output.vocab_size)
            sizes = wanted, MANY, options.shortlist or MANY
            limits.append(upload(np.array(sizes, np.int32), graphs.device))

        def follow(outputs: Tensor, roots: Tensor, noise: Tensor, *limits: Tensor) -> Outputs:
            added = self.output.noise(noise)
            by_block = outputs.unflatten(0, (len(roots), depths))
            return join(self.follow(computed, by_block, roots, added, *limits))

        inputs = outputs, roots, noise, *limits
        found, layout = graphs.run("the AR head", (computed, depths), follow, *inputs)
        numbers = found.cpu().numpy()[: len(blocks)]
        return tables(split(numbers, layout), depths, wanted)

    def shortlist(
        self, marginals: Tensor, size: int, limits: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if limits is None:
            return super().shortlist(marginals, size, None)
        vocab, used = shortlist(marginals, size, limits)
        excluded = torch.zeros(used.shape, device=used.device).masked_fill(~used, -torch.inf)
        return vocab, excluded

    @torch.inference_mode()
    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        return super().log_probs(block, previous)


TableHead: TypeAlias = ARHead | RecurrentHead
TABLE_HEADS: Mapping[str, Callable[[Any, OutputStage], TableHead]] = {
    "conditional": ARHead,
    "recurrent": RecurrentHead,
}
"""What computes the tables of a head, by `Head.kind`."""
