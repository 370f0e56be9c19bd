"""The cells of the ablation: one choice each that differs from the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Data = Literal["all", "half", "quarter", "greedy", "sampled"]
"""The answers to train on: both kinds, some of both, or one kind alone."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A drafter to train.

    Attributes:
        choice: what is varied.
        value: its name in the table.
        changes: of `TrainConfig`, against the base.
        data: the answers to train on.
    """

    choice: str
    value: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    data: Data = "all"

    @property
    def name(self) -> str:
        """In the results."""
        return f"{self.choice}: {self.value}"


BASE = Cell(choice="base", value="kl, exponential, swiglu")
CELLS = [
    BASE,
    *(
        Cell(choice="loss", value=loss, changes={"loss": loss})
        for loss in ("ce", "tv", "lk", "0.1 ce + 0.9 tv", "kl + tv")
    ),
    Cell(choice="weights", value="prefix-product", changes={"position_weights": "prefix-product"}),
    Cell(
        choice="weights",
        value="prefix-product, ce",
        changes={"position_weights": "prefix-product", "loss": "ce"},
    ),
    *(
        Cell(choice="head", value=head, changes={"head": head, "head_size": size})
        for head, size in (("linear", None), ("markov", 32), ("selector", 32), ("none", None))
    ),
    *(
        Cell(choice="on-policy", value=str(share), changes={"on_policy": share})
        for share in (0.5, 1.0)
    ),
    *(Cell(choice="block size", value=str(s), changes={"block_size": s}) for s in (4, 12)),
    *(Cell(choice="layers", value=str(n), changes={"layers": n}) for n in (1, 3)),
    Cell(choice="data", value="a half", data="half"),
    Cell(choice="data", value="a quarter", data="quarter"),
    Cell(choice="data", value="greedy alone", data="greedy"),
    Cell(choice="data", value="sampled alone", data="sampled"),
]
