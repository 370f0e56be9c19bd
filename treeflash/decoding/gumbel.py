"""Gumbel noise keyed by seed, position and token: the randomness of sampling.

The target samples a token by adding noise to its logits and taking the largest sum (Gumbel-max). A
drafter that adds the same noise to its own logits drafts what the target is likely to sample
(Daliri et al. 2024, arXiv 2408.07978), so that more of its drafts are accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig

SHIFTS, MULTIPLIERS = (16, 15, 16), (0x7FEB352D, 0x846CA68B)
"""Of the hash `lowbias32` (Wellons 2018)."""
HIGHEST = float(np.float32(1 - 2.0**-24))
"""The largest number below 1 in float32."""
KEPT_ROWS = 64
"""Positions whose noise is kept: a draft and its verification need the same."""


def position_keys(seed: int, positions: NDArray[np.int32]) -> NDArray[np.uint32]:
    """The keys of the noise at `positions`.

    A key depends on the seed and the position alone: not on the method, the budget, or what else is
    drawn. That is what makes a seed's output the same for all of them.

    Args:
        seed: below 2**64.
        positions: (n,) int32 absolute positions, 0 or more.

    Returns:
        (n, 2): number `p` of the Philox stream of the seed (Salmon et al. 2011), its lower half
        first.
    """
    # One counter step of NumPy's Philox makes four numbers, so any of them is reached in O(1).
    first = int(positions.min()) // 4
    count = int(positions.max()) - 4 * first + 1
    stream = np.random.Philox(key=seed, counter=first).random_raw(count)
    numbers = stream[positions - 4 * first].astype("<u8")
    return numbers.view("<u4").reshape(-1, 2).astype(np.uint32)


def gumbel(keys: NDArray[np.uint32], tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Noise of the standard Gumbel distribution: the definition that backends must match.

    A key's numbers are those of a hash of each token, under one half of the key, then the other.

    Args:
        keys: (n, 2).
        tokens: (v,) token ids, or (n, v).

    Returns:
        (n, v) float32, finite.
    """
    x = _mix(tokens.astype(np.uint32) ^ keys[:, :1])
    x = _mix(x ^ keys[:, 1:])
    # Small shares give the large noise that decides: they have float32's full precision.
    shares = ((x >> np.uint32(1)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-31)
    noise: NDArray[np.float32] = -np.log(-np.log1p(-np.minimum(shares, np.float32(HIGHEST))))
    return noise


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(multiplier)
    return x


def over_vocabulary(keys: NDArray[np.uint32], vocab_size: int) -> NDArray[np.float32]:
    """(n, vocab) noise of all tokens, for backends on a CPU; the last positions' is kept."""
    return np.stack([_row(*key, vocab_size) for key in keys.tolist()])


@lru_cache(KEPT_ROWS)
def _row(low: int, high: int, vocab_size: int) -> NDArray[np.float32]:
    keys = np.array([[low, high]], np.uint32)
    row: NDArray[np.float32] = gumbel(keys, np.arange(vocab_size, dtype=np.int32))[0]
    return row


@dataclass(frozen=True, eq=False)
class Noise:
    """The noise that will decide what the target samples, for a drafter.

    Attributes:
        keys: (n, 2) of the positions of n drafted tokens.
        scales: (n,) float32 sampling temperatures: logits plus noise of this scale are compared. 0
            for greedy decoding.
    """

    keys: NDArray[np.uint32]
    scales: NDArray[np.float32]

    @classmethod
    def at(cls, texts: Sequence[tuple[SamplingConfig, NDArray[np.int32]]]) -> Noise:
        """The noise of several texts, one after another.

        Args:
            texts: how each is sampled, and positions.
        """
        keys = [
            # Equal keys, whose noise is kept: it is multiplied by 0.
            np.zeros((len(positions), 2), np.uint32)
            if sampling.greedy
            else position_keys(sampling.seed, positions)
            for sampling, positions in texts
        ]
        temperatures = [sampling.temperature for sampling, _ in texts]
        scales = np.repeat(
            np.array(temperatures, np.float32), [len(positions) for _, positions in texts]
        )
        return cls(np.concatenate(keys), scales)

    def of(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """(n, v) to add to the logits of (v,) or (n, v) tokens."""
        return self.scales[:, None] * gumbel(self.keys, tokens)

    def split(self, parts: int) -> list[Noise]:
        """That of each of so many texts with equally many positions."""
        each = zip(np.split(self.keys, parts), np.split(self.scales, parts), strict=True)
        return [Noise(keys, scales) for keys, scales in each]
