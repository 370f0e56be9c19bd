"""The conditional head: a block's tables, from the scores of whichever head the drafter has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from treeflash.decoding.gumbel import Noise
from treeflash.decoding.transitions import TransitionTable
from treeflash_cuda.drafter import Block, drafted
from treeflash_cuda.drafter_model import DrafterModel
from treeflash_cuda.graphs import Outputs
from treeflash_cuda.linear import take
from treeflash_cuda.output_stage import OutputStage
from treeflash_cuda.scores import scores_of
from treeflash_cuda.target import Target
from treeflash_cuda.topk import divide_by_temperature, largest, top_log_probs, topk


class ARHead:
    """`treeflash.decoding.interfaces.ARHead` in PyTorch."""

    def __init__(self, module: nn.Module, model: DrafterModel, target: Target) -> None:
        """Use the weights of a head with those of its drafter and target."""
        self.module = module
        self.model = model
        self.target = target
        self.output = OutputStage(model.config, model.own, target)
        self.scores = scores_of(module, model, self.output)

    @torch.inference_mode()
    def transitions(
        self,
        blocks: Sequence[Block],
        m: int,
        k: int,
        temperature: float,
        *,
        noise: Noise | None = None,
        shortlist: int | None = None,
        rows: int | None = None,
    ) -> list[TransitionTable]:
        """See `ARHead.transitions`; the products of all texts are computed together."""
        hidden = drafted(blocks)
        depths = len(hidden) // len(blocks)
        settings = len(blocks), m, k, temperature, shortlist, rows

        def search(hidden: Tensor, roots: Tensor, uploaded: Tensor) -> Outputs:
            added = self.output.noise(uploaded)
            return self._search(hidden, roots, m, k, temperature, added, shortlist, rows)

        roots = _cat([block.token for block in blocks])
        found, shapes, confident = self.target.graphs.run(
            "the AR head", settings, search, hidden, roots, self.output.upload(noise)
        )
        numbers = found.cpu().numpy()
        tables = []
        for n, width, rows_per_depth in shapes:
            confidences = None
            if confident:
                confidences, numbers = np.split(numbers, [n])
                confidences = confidences.view(np.float32)
            own, numbers = np.split(numbers, [2 * n * (1 + width)])
            ids, tokens, log_probs = np.split(own, [2 * n, (2 + width) * n])
            places, previous_ids = np.split(ids, 2)
            tables.append(
                TransitionTable.from_rows(
                    places[1:],
                    previous_ids[1:],
                    tokens.reshape(n, width),
                    log_probs.view(np.float32).reshape(n, width),
                    (depths, rows_per_depth),
                    confidences,
                )
            )
        return tables

    def _search(
        self,
        hidden: Tensor,
        roots: Tensor,
        m: int,
        k: int,
        temperature: float,
        noise: Tensor | None,
        shortlist: int | None,
        rows: int | None,
    ) -> Outputs:
        """The numbers of the tables of all texts.

        Args:
            hidden: (texts * D, hidden_size) outputs.
            roots: (texts,).
            m: see `transitions`.
            k: see `transitions`.
            temperature: see `transitions`.
            noise: (texts * D, Vd) to add to logits; None for none.
            shortlist: see `transitions`.
            rows: see `transitions`.

        Returns:
            int32 numbers of all texts, see `_children`; per text its rows, children of a row, and
            rows per depth, scored or not; and whether there are confidences.
        """
        depths = len(hidden) // len(roots)
        normed = self.model.norm(hidden)
        logits = self.output.logits(normed)
        noisy = logits if noise is None else logits + noise
        marginals = divide_by_temperature(noisy, temperature).log_softmax(-1)
        texts = [
            self._candidates(root, part, m, shortlist, rows)
            for root, part in zip(roots.split(1), marginals.split(depths), strict=True)
        ]
        index = [text.depth + i * depths for i, text in enumerate(texts)]
        previous = [text.previous for text in texts]
        queries = self.scores.queries(hidden, normed, _cat(previous), _cat(index))
        sizes = [len(text.previous) for text in texts]
        confidence = self.scores.confidence(normed, _cat(previous), _cat(index))
        none = [None] * len(texts)
        each = zip(
            texts,
            queries.split(sizes),
            logits.split(depths),
            none if noise is None else noise.split(depths),
            none if confidence is None else confidence.split(sizes),
            strict=True,
        )
        numbers = _cat([self._children(*x, k, temperature) for x in each])
        shapes = [(len(x.previous), min(k, x.vocab_size), x.m) for x in texts]
        return numbers, shapes, confidence is not None

    @torch.inference_mode()
    def log_probs(self, block: Block, previous: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `ARHead.log_probs`."""
        hidden, scores = block.hidden, self.scores
        normed = self.model.norm(hidden)
        logits = self.output.logits(normed)
        queries = scores.queries(hidden, normed, torch.from_numpy(previous).to(hidden.device), None)
        if scores.candidates is None:
            log_probs = scores.score(queries, logits, None, None).float().log_softmax(-1)
        else:
            marginals = logits.float().log_softmax(-1)
            mass, tokens = topk(marginals, scores.candidates)
            own = scores.score(queries, logits, None, tokens).log_softmax(-1)
            own = own + mass.logsumexp(-1, keepdim=True)
            log_probs = torch.full_like(marginals, -torch.inf).scatter(1, tokens, own)
        return self.output.over_target_vocabulary(log_probs).cpu().numpy()

    def _candidates(
        self, root: Tensor, marginal: Tensor, m: int, shortlist: int | None, rows: int | None
    ) -> _Candidates:
        """Choose the rows of a text by the (D, Vd) marginal log probabilities of its block."""
        vocab = None
        if self.scores.candidates is not None:
            marginal, vocab = topk(marginal, self.scores.candidates)
        elif shortlist is not None and shortlist < marginal.shape[1]:
            vocab = largest(marginal.amax(0), shortlist)
            marginal = marginal.index_select(1, vocab)
        m = min(m, marginal.shape[1])
        best, order = topk(marginal[:-1], m)
        weights, previous = best.flatten(), order
        if vocab is not None:
            previous = vocab[order] if vocab.ndim == 1 else vocab[:-1].gather(1, order)
        kept = weights.argsort(descending=True, stable=True)[:rows].sort().values
        previous = self.output.to_target(previous.flatten()[kept])
        first = root.to(previous.dtype)
        places = torch.cat([torch.zeros_like(first), m + kept])
        return _Candidates(
            places,
            torch.cat([first, previous]),
            places // m,
            m,
            vocab,
            marginal.logsumexp(-1),
            marginal.shape[1],
        )

    def _children(
        self,
        text: _Candidates,
        queries: Tensor,
        logits: Tensor,
        noise: Tensor | None,
        confidence: Tensor | None,
        k: int,
        temperature: float,
    ) -> Tensor:
        """The numbers of a text's table, as int32 for one read from the device.

        The confidence in each row if the head says, places and previous tokens of its n rows,
        (n, k) children, (n, k) log probabilities.
        """
        scores = self.scores.score(queries, logits, text.depth, text.vocab)
        if noise is not None:
            scores = scores + take(_columns(noise, text.vocab), text.depth)
        tokens, log_probs = top_log_probs(scores, k, temperature)
        if text.vocab is not None:
            shared = text.vocab.ndim == 1
            best = tokens.long()
            tokens = text.vocab[best] if shared else take(text.vocab, text.depth).gather(1, best)
            tokens = tokens.int()
            log_probs += text.mass[text.depth, None]
        tokens = self.output.to_target(tokens)
        ids = torch.cat([text.places, text.previous]).int()
        parts = [ids, tokens.flatten(), log_probs.view(torch.int32).flatten()]
        if confidence is not None:
            parts.insert(0, confidence.view(torch.int32))
        return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """The rows of one text's table: the root's, and those of previous tokens that are scored.

    Attributes:
        places: (n,) among all D * m rows, ascending.
        previous: (n,) tokens of the target's vocabulary, the root first.
        depth: (n,) of the rows, from 0.
        m: rows per depth, whether scored or not.
        vocab: (v,) tokens of the shortlist, ascending, or (D, v) candidates of each depth, of the
            drafter's vocabulary; None for all of it.
        mass: (D,) log of the probability that the marginals give to them.
        vocab_size: tokens that children are chosen from.
    """

    places: Tensor
    previous: Tensor
    depth: Tensor
    m: int
    vocab: Tensor | None
    mass: Tensor
    vocab_size: int


def _columns(x: Tensor, tokens: Tensor | None) -> Tensor:
    """(D, v) of (D, Vd): the columns of (v,) tokens, or of (D, v) each depth's own; None is all."""
    if tokens is None:
        return x
    return x.index_select(1, tokens) if tokens.ndim == 1 else x.gather(1, tokens)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
