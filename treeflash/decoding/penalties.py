"""Penalties and logit biases, exact on draft trees: each node's follow from its own path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from treeflash.config import Penalties
from treeflash.decoding.choices import LogitEdits
from treeflash.decoding.tree import DraftTree


class PenaltyState:
    """The tokens of one text, as far as penalties ask for them.

    The repetition penalty counts the prompt and the generated tokens, the presence and frequency
    penalties the generated tokens alone, as in vLLM.
    """

    def __init__(self, penalties: Penalties, prompt_ids: Sequence[int]) -> None:
        """Start with a prompt."""
        self.penalties = penalties
        self.prompt = np.unique(np.array(prompt_ids, np.int64))
        self.generated: Counter[int] = Counter()

    def add(self, tokens: Iterable[int]) -> None:
        """Count newly generated tokens."""
        self.generated.update(tokens)

    def edits(self, tree: DraftTree) -> LogitEdits | None:
        """The changes of the logits at each node.

        Args:
            tree: its root is counted already, the tokens below it are not.

        Returns:
            For n nodes; None if the penalties change nothing.
        """
        penalties = self.penalties
        if not penalties.active:
            return None
        bias = dict(penalties.logit_bias)
        repeated = self.prompt if penalties.repetition != 1 else self.prompt[:0]
        tokens = np.unique(
            np.concatenate([repeated, tree.tokens, [*self.generated], [*bias]]).astype(np.int64)
        )
        counts = np.array([self.generated[token] for token in tokens.tolist()], np.int64)
        drafted = tree.tokens[1:, None] == tokens
        counts = counts + tree.ancestor_mask()[:, 1:].astype(np.int64) @ drafted
        seen = (counts > 0) | np.isin(tokens, self.prompt)
        factors = np.where(seen, penalties.repetition, 1.0)
        additions = (
            np.array([bias.get(token, 0.0) for token in tokens.tolist()])
            - penalties.presence * (counts > 0)
            - penalties.frequency * counts
        )
        rows, columns = np.nonzero((factors != 1) | (additions != 0))
        return LogitEdits(
            rows,
            tokens[columns],
            factors[rows, columns].astype(np.float32),
            additions[rows, columns].astype(np.float32),
        )
