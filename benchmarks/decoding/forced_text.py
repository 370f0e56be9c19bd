"""Force the target to write a given text, so that all methods are compared on the same text.

In half precision a near-tie can resolve differently in a tree than alone, and the texts diverge.
Texts differ in how easy they are to draft by more than methods do. So the target runs as usual, but
its choices are replaced by the tokens of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding.interfaces import Backend, Features, TreeVerifier
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

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def verifier(self, *, features: bool) -> _Verifier:
        """See `Backend.verifier`."""
        return _Verifier(self.backend.verifier(features=features), self.text)


class _Verifier:
    """A verifier whose choices after the prompt are those of the text."""

    def __init__(self, verifier: TreeVerifier, text: Sequence[int]) -> None:
        self.verifier = verifier
        self.text = text
        self.prompt_length = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.verifier, name)

    def prefill(
        self,
        token_ids: Sequence[int],
        sampling: SamplingConfig,
        uniforms: NDArray[np.float64] | None,
    ) -> tuple[int, Features]:
        self.prompt_length = len(token_ids)
        return self.verifier.prefill(token_ids, sampling, uniforms)

    def verify(
        self, tree: DraftTree, sampling: SamplingConfig, uniforms: NDArray[np.float64] | None
    ) -> NDArray[np.int32]:
        root = self.verifier.length - self.prompt_length
        chosen = self.verifier.verify(tree, sampling, uniforms)
        return force(tree, self.text[root + 1 :], chosen)
