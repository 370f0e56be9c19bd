"""Online calibration: a drafter's probabilities, corrected by what the target chose in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.transitions import TransitionTable

EXPONENTS = 2.0 ** np.arange(-2, 2.125, 0.125)
"""What probabilities may be raised to: above 1 makes them sharper, below 1 flatter."""
SPREAD = 0.2
"""Standard deviation of the logarithm of the exponent before anything was seen."""
LEAST_REST = 1e-3
"""Probability that the children of a row leave to other tokens at least: the drafter may not know
all of them, and what float32 leaves is noise."""


@dataclass(eq=False)
class Calibration:
    """How much sharper or flatter than its own a drafter's distributions should be, in one text.

    With probabilities that are too flat a tree is too wide, with some that are too sharp too deep.
    All rows are raised to one exponent and normalised: its inverse is a temperature (Guo et al.
    2017). It is learned by Bayes' rule from the token that the target chose after each row that it
    reached, drafted or not, so that the trees' shapes do not bias it. It depends on the text so far
    alone, and never changes the output.

    Attributes:
        vocab_size: of the target.
        log_weights: of the exponents, by what was seen so far.
    """

    vocab_size: int
    log_weights: NDArray[np.float64] = field(
        default_factory=lambda: -0.5 * (np.log(EXPONENTS) / SPREAD) ** 2
    )

    @property
    def exponent(self) -> float:
        """The geometric mean of the exponents by their weights; 1 before anything was seen."""
        weights = np.exp(self.log_weights - self.log_weights.max())
        return float(np.exp(weights @ np.log(EXPONENTS) / weights.sum()))

    def correct(self, table: TransitionTable) -> TransitionTable:
        """The table with calibrated probabilities; the order of children is the same."""
        exponent, log_probs = self.exponent, table.log_probs.astype(np.float64)
        scores = exponent * log_probs
        total = np.exp(scores).sum(-1) + np.exp(self._rest(log_probs, exponent))
        calibrated = np.minimum(scores - np.log(total)[..., None], 0)
        return replace(table, log_probs=calibrated.astype(np.float32))

    def observe(self, table: TransitionTable, tokens: Sequence[int]) -> None:
        """Learn from an iteration.

        Args:
            table: as it was drafted.
            tokens: that the target chose after the root.
        """
        row = 0
        for depth, token in enumerate(tokens[: table.depths]):
            log_probs = table.log_probs[depth, row].astype(np.float64)
            scores = EXPONENTS[:, None] * log_probs
            rest = self._rest(log_probs, EXPONENTS)
            total = np.log(np.exp(scores).sum(-1) + np.exp(rest))
            children = table.tokens[depth, row] == token
            found = np.flatnonzero(children & np.isfinite(log_probs))
            if not len(found):
                self.log_weights = self.log_weights + rest - total
                return
            self.log_weights = self.log_weights + scores[:, found[0]] - total
            row = int(table.next_row[depth, row, found[0]])
            if row < 0:
                return

    def _rest(
        self, log_probs: NDArray[np.float64], exponents: NDArray[np.float64] | float
    ) -> NDArray[np.float64]:
        """Logarithm of the tokens that rows do not list, each raised to an exponent, and summed.

        They are taken to be as probable as the last child, or less if the vocabulary has not as
        many.
        """
        rest = np.log(np.maximum(1 - np.exp(log_probs).sum(-1), LEAST_REST))
        last = np.min(log_probs, axis=-1, initial=0, where=np.isfinite(log_probs))
        number = np.clip(rest - last, 0, np.log(self.vocab_size))
        found: NDArray[np.float64] = (1 - exponents) * number + exponents * rest
        return found
