"""The state of a text, which a backend keeps on its device and the core passes around."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TextState(Protocol):
    """The state of one text on the device: keys and values of its committed positions.

    It holds the target's and, if it was opened for drafting, the drafter's, with those features of
    committed positions that the drafter has not read yet. Recurrent layers of the target keep the
    state after the last position alone: such a text can be forked and truncated only to lengths at
    which a snapshot was taken. For other targets, inherit from
    `treeflash.decoding.one_by_one.WithoutRecurrence`.
    """

    @property
    def length(self) -> int:
        """Committed positions, 0 .. length - 1. The next root stands at position `length`."""

    @property
    def nbytes(self) -> int:
        """Device memory that the state holds, bytes, its snapshots included."""

    @property
    def needs_snapshots(self) -> bool:
        """Whether the target has recurrent layers."""

    def snapshot(self) -> None:
        """Keep what a later fork or truncation to the present length needs.

        The latest few snapshots are kept (`treeflash.decoding.snapshots`). Without recurrent layers
        it does nothing.
        """

    def restorable(self, length: int) -> int:
        """The longest length up to `length` to which the state can be forked or truncated.

        Without recurrent layers that is the smaller of `length` and the present length; with them
        the present length or that of a snapshot; 0 if there is none.
        """

    def fork(self, length: int, capacity: int) -> TextState:
        """A new state with a copy of the first `length` positions, and of the snapshots there.

        Args:
            length: one that `restorable` returned.
            capacity: positions that the new state can hold.
        """

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on; see `fork`."""

    def close(self) -> None:
        """Give the memory back; the state cannot be used any more. Closing twice is harmless."""

    def keys_values(self) -> NDArray[np.float32]:
        """The target's committed keys and values, for tests.

        (attention layers, 2, kv_heads, length, head_dim).
        """

    def states(self) -> list[NDArray[np.float32]]:
        """The states of the target's recurrent layers after the last position, for tests.

        Layer by layer: (W - 1, channels) the last inputs of each short convolution of width W,
        without bias and activation, and (heads, key_dim, value_dim) the matrix state, if it has
        one. Mamba-2's keys are B, its values x. Empty without recurrent layers.
        """

    def drafter_keys_values(self) -> NDArray[np.float32]:
        """The same of the drafter; of the positions that it has read."""
