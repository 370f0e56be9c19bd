"""Force the target to write a given text, so that all methods are compared on the same text.

In half precision a near-tie can resolve differently in a tree than alone, and the texts diverge.
Texts differ in how easy they are to draft by more than methods do. So the target runs as usual, but
its choices are replaced by the tokens of the text.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.choices import Chosen
from treeflash.decoding.interfaces import Backend, Extension, TreeVerifier, Verification
from treeflash.decoding.text_state import TextState
from treeflash.decoding.tree import DraftTree


def force(
    tree: DraftTree, following: Sequence[int], chosen: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Replace a target's choices by the tokens of a text.

    Args:
        tree: n nodes.
        following: tokens of the text after the root.
        chosen: (n,) int32; the target's choices, kept beyond the end of the text.

    Returns:
        (n,) int32; at depth d the text's token d + 1 after the root.
    """
    known = tree.depths < len(following)
    forced = chosen.copy()
    forced[known] = np.array(following, np.int32)[tree.depths[known]]
    return forced


class ForcedText:
    """A backend whose target writes a given text.

    Attributes:
        text: token ids; if it is empty, and beyond its end, the target chooses freely.
    """

    def __init__(self, backend: Backend) -> None:
        """Wrap a loaded pair."""
        self.backend = backend
        self.text: Sequence[int] = ()
        self._prompt_lengths: MutableMapping[TextState, int] = WeakKeyDictionary()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    @property
    def verifier(self) -> _Verifier:
        """See `Backend.verifier`."""
        return _Verifier(self.backend.verifier, self.text, self._prompt_lengths)


@dataclass(frozen=True, eq=False)
class _Verifier:
    """A verifier whose choices after the prompt are those of the text."""

    verifier: TreeVerifier
    text: Sequence[int]
    prompt_lengths: MutableMapping[TextState, int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.verifier, name)

    def run(self, work: Sequence[Extension | Verification]) -> list[Chosen | None]:
        found = []
        for item, chosen in zip(work, self.verifier.run(work), strict=True):
            if isinstance(item, Extension):
                self.prompt_lengths[item.state] = item.state.length
            elif chosen is not None:
                root = item.state.length - self.prompt_lengths[item.state]
                forced = force(item.tree, self.text[root + 1 :], chosen.tokens)
                chosen = replace(chosen, tokens=forced)
            found.append(chosen)
        return found
