"""The conditional heads in training: a log probability of each token, given the one before it.

They share their weights and their names with those of decoding (`treeflash_cuda.scores`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from treeflash.drafter_config import DrafterConfig
from treeflash_cuda.head_weights import MarkovWeights, SelectorWeights
from treeflash_cuda.topk import topk
from treeflash_cuda.training.lm_head import LMHead, Shortlist


class Head(Protocol):
    """A conditional head, or none."""

    def queries(self, hidden: Tensor, normed: Tensor, previous: Tensor) -> Tensor:
        """(n, size) what is compared with tokens.

        Args:
            hidden: (n, hidden_size) outputs of the last layer.
            normed: (n, hidden_size) the same, normalised.
            previous: (n,) tokens.
        """

    def log_probs(self, queries: Tensor, normed: Tensor, shortlist: Shortlist | None) -> Tensor:
        """(n, v) log probabilities of the vocabulary or of a shortlist."""


class Marginal:
    """No head: the drafter's own prediction, whatever the previous token."""

    def __init__(self, lm_head: LMHead) -> None:
        """Use the target's output head."""
        self.lm_head = lm_head

    def queries(self, hidden: Tensor, normed: Tensor, previous: Tensor) -> Tensor:
        """See `Head.queries`."""
        return normed

    def log_probs(self, queries: Tensor, normed: Tensor, shortlist: Shortlist | None) -> Tensor:
        """See `Head.log_probs`."""
        return self.lm_head.logits(normed, shortlist).log_softmax(-1)


class Corrected:
    """TreeFlash: the output head reads h' = h + correction([embedding; u])."""

    def __init__(
        self, correction: nn.Module, norm: nn.Module, embeddings: Tensor, lm_head: LMHead
    ) -> None:
        """Use a correction with the drafter's norm and the target's embeddings."""
        self.correction = correction
        self.norm = norm
        self.embeddings = embeddings
        self.lm_head = lm_head

    def queries(self, hidden: Tensor, normed: Tensor, previous: Tensor) -> Tensor:
        """See `Head.queries`: the normalised corrected outputs."""
        embedded = F.embedding(previous, self.embeddings)
        return self.norm(hidden + self.correction(embedded, normed, None))

    def log_probs(self, queries: Tensor, normed: Tensor, shortlist: Shortlist | None) -> Tensor:
        """See `Head.log_probs`."""
        return self.lm_head.logits(queries, shortlist).log_softmax(-1)


class Markov:
    """DSpark: z(b) + <W2[b], W1[a]>."""

    def __init__(self, weights: MarkovWeights, lm_head: LMHead) -> None:
        """Take the weights."""
        self.weights = weights
        self.lm_head = lm_head

    def queries(self, hidden: Tensor, normed: Tensor, previous: Tensor) -> Tensor:
        """See `Head.queries`."""
        row: Tensor = self.weights.markov_w1(previous)
        return row

    def log_probs(self, queries: Tensor, normed: Tensor, shortlist: Shortlist | None) -> Tensor:
        """See `Head.log_probs`."""
        keys = self.weights.markov_w2.weight
        if shortlist is not None:
            keys = keys[shortlist.tokens]
        logits = self.lm_head.logits(normed, shortlist) + (queries @ keys.T).float()
        return logits.log_softmax(-1)


class Selector:
    """DFlash2: the best tokens of a slot are ranked anew by U(b) + <A[a] * W u, B[b]>.

    These candidates are the ones that decoding scores. The others keep their marginal probability,
    so that a candidate that is missed has a finite loss.
    """

    def __init__(self, weights: SelectorWeights, candidates: int, lm_head: LMHead) -> None:
        """Take the weights, and how many tokens of a slot are scored."""
        self.weights = weights
        self.candidates = candidates
        self.lm_head = lm_head

    def queries(self, hidden: Tensor, normed: Tensor, previous: Tensor) -> Tensor:
        """See `Head.queries`."""
        rows = self.weights.predecessor_codebook[previous]
        return rows * self.weights.hidden_projection(normed)

    def log_probs(self, queries: Tensor, normed: Tensor, shortlist: Shortlist | None) -> Tensor:
        """See `Head.log_probs`; candidates are tokens to score of the shortlist."""
        logits = self.lm_head.logits(normed, shortlist)
        marginals = logits.log_softmax(-1)
        scored = logits if shortlist is None else logits[:, : shortlist.wanted]
        _, best = topk(scored.detach(), self.candidates)
        tokens = best if shortlist is None else shortlist.tokens[best]
        keys = self.weights.successor_codebook[tokens].float()
        terms = (keys @ queries.float()[:, :, None])[..., 0]
        scores = (terms + logits.gather(1, best)).log_softmax(-1)
        mass = marginals.gather(1, best).logsumexp(-1, keepdim=True)
        return marginals.scatter(1, best, scores + mass)


def trained_head(
    module: Any, config: DrafterConfig, norm: nn.Module, embeddings: Tensor, lm_head: LMHead
) -> Head:
    """The head with these weights."""
    if isinstance(module, MarkovWeights):
        return Markov(module, lm_head)
    if isinstance(module, SelectorWeights):
        return Selector(module, config.selector_top_k, lm_head)
    return Corrected(module, norm, embeddings, lm_head)
