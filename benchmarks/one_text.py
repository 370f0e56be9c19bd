"""A target that writes a given text, so that all methods are compared along the same one.

In half precision a near-tie can fall differently in a tree than alone, and the text goes another
way: some texts are easier to draft than others, by more than methods differ. Here the target runs
as always, but where it would leave the text it is overruled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeflash.config import SamplingConfig
from treeflash.decoding.interfaces import Backend, Features, TreeVerifier
from treeflash.decoding.tree import DraftTree


def follow(
    tree: DraftTree, following: Sequence[int], chosen: NDArray[np.int32]
) -> NDArray[np.int32]:
    """(n,) what a target chooses that writes these tokens after the root, and then as it chose."""
    known = tree.depths < len(following)
    followed = chosen.copy()
    followed[known] = np.array(following, np.int32)[tree.depths[known]]
    return followed


class OneText:
    """A backend whose target writes a text.

    Attributes:
        text: its tokens; where it is empty, or at its end, the target chooses.
    """

    def __init__(self, backend: Backend) -> None:
        """Take a loaded pair."""
        self.backend = backend
        self.text: Sequence[int] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def verifier(self, *, features: bool) -> _Verifier:
        """See `Backend.verifier`."""
        return _Verifier(self.backend.verifier(features=features), self.text)


class _Verifier:
    """The verifier of a prompt that the text follows."""

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
        return follow(tree, self.text[root + 1 :], chosen)
