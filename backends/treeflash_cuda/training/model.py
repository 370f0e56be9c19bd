"""The drafter in training: many blocks of many sequences in one forward pass.

The conditional heads are the heads of decoding (`treeflash_cuda.heads`), applied to all positions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from treeflash.drafters.formats import HEADS
from treeflash.drafters.heads.operations import ConditionalHead, Slots
from treeflash.drafters.heads.treeflash import Corrected
from treeflash.drafters.layers import Attend
from treeflash_cuda.attention import additive_mask, group_mask, grouped_attention
from treeflash_cuda.drafter import OutputStage
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.heads import ScoredTokens
from treeflash_cuda.linear import token_products
from treeflash_cuda.numerics import topk
from treeflash_cuda.training.batch import Batch

CHUNK_LOGITS = 2**27
"""Logits in memory at once: half a gigabyte in float32."""


@dataclass(frozen=True, eq=False)
class Shortlist:
    """A part of the vocabulary that represents all of it."""

    tokens: Tensor  # (v,) the tokens to score, then a random sample of the others
    num_scored: int  # number of tokens to score
    # (v,) 0 for the tokens to score; for the sample, the log of the number of tokens that each
    # represents.
    log_weights: Tensor
    index: Tensor  # (vocab,) the index of a token in `tokens`; -1 if it is not there


def make_shortlist(
    scored: Tensor, vocab_size: int, negatives: int, generator: torch.Generator
) -> Shortlist | None:
    """Return the tokens to score and a uniform sample of the others; None is the whole vocabulary.

    The normaliser over a shortlist is unbiased, as each sampled token is weighted by the number of
    tokens that it represents (sampled softmax, Bengio and Senecal 2008). The generator is on the
    CPU, so that a run is the same on every device.
    """
    index = torch.full((vocab_size,), -1, dtype=torch.long)
    index[scored.flatten().cpu()] = 0
    kept = torch.nonzero(index == 0)[:, 0]
    others = torch.nonzero(index < 0)[:, 0]
    if negatives >= len(others):
        return None
    # Tokens are drawn with replacement, which is unbiased, as a token drawn twice counts twice.
    sample = others[torch.randint(len(others), (negatives,), generator=generator)]
    tokens = torch.cat([kept, sample])
    index[tokens] = torch.arange(len(tokens))
    weights = torch.zeros(len(tokens))
    weights[len(kept) :] = math.log(len(others) / negatives)
    device = scored.device
    return Shortlist(tokens.to(device), len(kept), weights.to(device), index.to(device))


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]],
    rows: Sequence[Tensor],
    width: int,
    *,
    most: int = CHUNK_LOGITS,
) -> tuple[Tensor, ...]:
    """Apply a function to a few rows at a time, so that only their `most` logits are in memory.

    The function takes rows of several (n, ...) tensors and returns tensors with as many rows; it
    computes `width` logits for a row. The gradient computes them again, chunk by chunk. If all rows
    fit at once, their logits are kept.
    """
    size = max(1, most // width)
    if len(rows[0]) <= size:
        return function(*rows)
    chunks = zip(*(tensor.split(size) for tensor in rows), strict=True)
    parts = [checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


ROW_ANCHORS = 8
"""Anchors whose blocks share a row of keys."""


def block_attention(
    anchors: Tensor, size: int, length: int, window: int | None, causal: bool
) -> Attend:
    """Return one layer's fastest attention, in which a block sees itself and all before its root.

    It takes (rows, heads, A * S, head_dim) queries, and (rows, kv_heads, length + A * S, head_dim)
    keys and values, the sequence's first, to (rows, A * S, heads, head_dim). The blocks have S
    slots after the roots at (rows, A) anchors. The window is how far a slot sees, in positions;
    None is everything.
    """
    make = flex_block_attention if anchors.device.type == "cuda" else grouped_block_attention
    return make(anchors, size, length, window, causal)


def grouped_block_attention(
    anchors: Tensor, size: int, length: int, window: int | None, causal: bool
) -> Attend:
    """Return attention with a mask, by groups of blocks that share a row of keys; for any device.

    No block sees another, so small groups waste little. A is a multiple of `ROW_ANCHORS`.
    """
    device = anchors.device
    columns = torch.arange(length, device=device)
    roots = anchors.reshape(-1, ROW_ANCHORS).repeat_interleave(size, 1)[:, :, None]
    positions = anchors[:, :, None] + torch.arange(size, device=device)
    positions = positions.reshape(-1, ROW_ANCHORS * size)
    blocks = torch.arange(ROW_ANCHORS * size, device=device) // size
    same_block = (blocks[:, None] == blocks).expand(len(positions), -1, -1)
    visible = torch.cat([columns < roots, same_block], -1)
    if causal or window is not None:
        keys = torch.cat([columns.expand(len(positions), -1), positions], 1)
        distance = positions[:, :, None] - keys[:, None, :]
        visible = visible & _is_near(distance, window, causal)
    groups, mask = (
        anchors.shape[1] // ROW_ANCHORS,
        additive_mask(visible, torch.float32)[:, None],
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def grouped(blocks: Tensor) -> Tensor:
            return blocks.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1).to(v.dtype)

        def with_context(both: Tensor) -> Tensor:
            context = both[:, :, :length].to(v.dtype).repeat_interleave(groups, 0)
            return torch.cat([context, grouped(both[:, :, length:])], 2)

        bias = group_mask(mask.to(v.dtype), q.shape[1] // k.shape[1])
        keys_and_values, rows = [(with_context(k), with_context(v))], [q.shape[2] // groups]
        out = grouped_attention(grouped(q), keys_and_values, [bias], rows, q.shape[-1] ** -0.5)
        return out.unflatten(0, (len(q), groups)).flatten(1, 2)

    return attend


def flex_block_attention(
    anchors: Tensor, size: int, length: int, window: int | None, causal: bool
) -> Attend:
    """Return attention that makes no mask in memory, and skips what no block sees.

    FlexAttention needs a compiler and a GPU. A may be any number.
    """
    rows, count = anchors.shape

    def is_visible(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block, slot = query // size, query % size
        root = anchors[row, block]
        in_block = key >= length
        block_key = (key - length).clamp(min=0)
        visible = torch.where(in_block, block_key // size == block, key < root)
        if causal or window is not None:
            position = torch.where(in_block, root + block_key % size, key)
            visible = visible & _is_near(root + slot - position, window, causal)
        return visible

    shape = rows, None, count * size, length + count * size
    mask = create_block_mask(is_visible, *shape, device=str(anchors.device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        compiled = _compiled_attention()
        out: Tensor = compiled(q.to(v.dtype), k.to(v.dtype), v, block_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    return attend


@functools.cache
def _compiled_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def _is_near(distance: Tensor, window: int | None, causal: bool) -> Tensor:
    """Return whether a query sees a key `distance` positions before it."""
    near = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return near if window is None else near & (distance.abs() < window)


class Prediction(NamedTuple):
    """The drafter's prediction of n tokens."""

    log_probs: Tensor  # (n, w) nats of the tokens to score
    best: Tensor  # (n,) nats of its most probable token


class Blocks(nn.Module):
    """A drafter and its conditional head as one module.

    All of training goes through `forward`, as wrappers for several processes need.
    """

    def __init__(
        self, model: DrafterModel, head: nn.Module | None, embeddings: Tensor, lm_head: Any
    ) -> None:
        """Add the target's embeddings and output head, which are not trained."""
        super().__init__()
        self.model = model
        # A tuple keeps these tensors from being moved and saved with the module.
        self.of_target = embeddings, lm_head
        # The names of the head's tensors in a checkpoint begin with this prefix.
        self.head_name = HEADS[model.config.head or "swiglu"].prefix.removesuffix(".")
        self.add_module(self.head_name, head)

    def hidden(self, batch: Batch) -> Tensor:
        """Return (rows, A, D, hidden_size) outputs of the last layer at the slots that predict."""
        config = self.model.config
        rows, anchors = batch.anchors.shape
        size, device = config.block_size, batch.tokens.device
        length = batch.tokens.shape[1]
        context = self.model.project(batch.features.to(self.model.fc.weight.dtype))
        positions = (batch.anchors[:, :, None] + torch.arange(size, device=device)).flatten(1)
        columns = torch.arange(length, device=device).expand(rows, -1)
        cos, sin = self.model.rotary(torch.cat([columns, positions], 1), torch.float32)
        rotation = cos[:, None], sin[:, None]  # shared by all heads
        block_rotation = cos[:, None, length:], sin[:, None, length:]
        tokens = torch.full((rows, anchors, size), config.mask_token_id, device=device)
        tokens[:, :, 0] = batch.tokens.gather(1, batch.anchors)
        x = F.embedding(tokens.flatten(1), self.of_target[0]) * config.input_scale
        kinds = config.layer_kinds
        attention = {
            kind: block_attention(batch.anchors, size, length, *kind) for kind in set(kinds)
        }

        def with_context(y: Tensor) -> Tensor:
            return torch.cat([context, y], 1)

        for layer, kind in zip(self.model.layers, kinds, strict=True):
            x = layer(x, with_context, (block_rotation, rotation), attention[kind])
        return x.unflatten(1, (anchors, size))[:, :, config.first_slot :]

    def forward(
        self, batch: Batch, scored: Tensor | None = None, shortlist: Shortlist | None = None
    ) -> tuple[Prediction, Prediction | None] | Tensor:
        """Predict the n tokens of a batch, whose anchors are the roots, or draft blocks.

        `scored` are (n, w) tokens whose log probabilities to return; None drafts. The `shortlist`
        contains all of them; None is the whole vocabulary. Returns the predictions without and with
        the previous token; the second is None if the drafter has no head. Or the (rows, A, D)
        drafts: chains of the best tokens.
        """
        hidden = self.hidden(batch)
        if scored is None:
            return self._draft(hidden, batch.tokens.gather(1, batch.anchors))
        hidden = hidden[batch.valid]
        normed = self.model.norm(hidden)
        index = scored if shortlist is None else shortlist.index[scored]
        head, output = self._head(), TargetOutput(self.model, *self.of_target, shortlist)
        queries = normed
        if head is not None:
            slots = Slots(output, hidden, normed)
            queries = head.queries(slots, batch.previous_tokens(), None)

        def predict(queries: Tensor, normed: Tensor, index: Tensor) -> tuple[Tensor, ...]:
            logits = output.logits(normed)
            log_probs = [logits.log_softmax(-1)]
            if head is not None:
                log_probs.append(conditional_log_probs(head, output, queries, logits))
            scores = [part.gather(1, index) for part in log_probs]
            return *scores, *(part.detach().amax(-1) for part in log_probs)

        heads = 1 if head is None else 2
        columns = in_chunks(predict, (queries, normed, index), heads * output.vocab_size)
        marginal, *corrected = map(Prediction, columns[:heads], columns[heads:])
        return marginal, corrected[0] if corrected else None

    def _draft(self, hidden: Tensor, roots: Tensor) -> Tensor:
        """Return the (rows, A, D) tokens, each the best after the one before it."""
        head, output = self._head(), TargetOutput(self.model, *self.of_target)

        def best(queries: Tensor, normed: Tensor) -> tuple[Tensor]:
            if isinstance(head, Corrected):  # it does not read the marginals
                return (head.score(queries, ScoredTokens(output, normed, None, None)).argmax(-1),)
            logits = output.logits(normed)
            if head is not None:
                logits = conditional_log_probs(head, output, queries, logits)
            return (logits.argmax(-1),)

        chain = [roots.flatten()]
        for slot in hidden.flatten(0, 1).unbind(1):
            normed = self.model.norm(slot)
            queries = normed
            if head is not None:
                queries = head.queries(Slots(output, slot, normed), chain[-1], None)
            chain += in_chunks(best, (queries, normed), output.vocab_size)
        return torch.stack(chain[1:], -1).view(*roots.shape, -1)

    def _head(self) -> ConditionalHead | None:
        return getattr(self, self.head_name)


class TargetOutput(OutputStage):
    """The parts of an `OutputStage` that training uses, over the vocabulary or a shortlist."""

    def __init__(
        self,
        model: DrafterModel,
        embeddings: Tensor,  # input embeddings of the target
        lm_head: Any,  # output layer of the target
        shortlist: Shortlist | None = None,
    ) -> None:
        self.norm, self.embeddings, self.shortlist = model.norm, embeddings, shortlist
        bias: Tensor | None = getattr(lm_head, "bias", None)
        self.weight: Tensor = lm_head.weight.detach()
        self.bias = None if bias is None else bias.detach()

    @property
    def vocab_size(self) -> int:
        return len(self.weight if self.shortlist is None else self.shortlist.tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        """Compute the (n, hidden_size) rows of the input table."""
        return F.embedding(tokens, self.embeddings)

    def logits(self, normed: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return (n, v) float32 of all tokens; the log weights of a shortlist are added."""
        chosen = None if self.shortlist is None else self.shortlist.tokens
        normed = normed.to(self.weight.dtype)
        logits = token_products(normed, self.weight, chosen, self.bias).float()
        # bfloat16 would round these logarithms to two digits.
        return logits if self.shortlist is None else logits + self.shortlist.log_weights


def conditional_log_probs(
    head: ConditionalHead, output: TargetOutput, queries: Tensor, logits: Tensor
) -> Tensor:
    """Return (n, v) log probabilities of the vocabulary or a shortlist, after the previous tokens.

    They follow from the (n, size) queries of the head and the (n, v) logits of the marginals. A
    selector ranks only the best tokens of a slot anew, as in decoding. The others keep their
    marginal probability, so that a candidate that is missed has a finite loss.
    """
    shortlist = output.shortlist
    tokens = None if shortlist is None else shortlist.tokens
    if head.candidates is None:
        scores: Tensor = head.score(queries, ScoredTokens(output, logits, None, tokens))
        return scores.log_softmax(-1)
    marginals = logits.log_softmax(-1)
    scored = logits if shortlist is None else logits[:, : shortlist.num_scored]
    _, best = topk(scored.detach(), head.candidates)
    candidates = best if tokens is None else tokens[best]
    scored_tokens = ScoredTokens(output, logits.gather(1, best), None, candidates)
    scores = head.score(queries, scored_tokens).log_softmax(-1)
    mass = marginals.gather(1, best).logsumexp(-1, keepdim=True)
    return marginals.scatter(1, best, scores + mass)
