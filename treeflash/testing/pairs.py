"""Pairs loaded by the backend under test and by the reference, and the settings of tests."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import pytest
from hypothesis import HealthCheck, Phase, settings

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding.interfaces import Backend, Loader
from treeflash.reference import backend as reference
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_dialect, write_drafter, write_target

VARIABLE = "TREEFLASH_REQUIRE_BACKENDS"


def require(module: str) -> None:
    """Skip the calling module or test where `module` cannot be imported, and say why.

    With the environment variable `TREEFLASH_REQUIRE_BACKENDS` set, as in continuous integration,
    the import error is raised instead: a skip there would hide that nothing was tested.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        if os.environ.get(VARIABLE):
            raise
        pytest.skip(f"needs {module}: {error}", allow_module_level=True)


EXAMPLES = int(os.environ.get("TREEFLASH_EXAMPLES", "0"))
"""How many random examples each property is tested with, as the nightly run does.

Without it a few are tested that are the same in every run. Random ones can meet a near-tie of two
tokens by chance: then the seed that Hypothesis prints has failed, not the backend.
"""

repeated = settings(
    max_examples=EXAMPLES or 5,
    deadline=None,
    derandomize=not EXAMPLES,
    phases=[Phase.generate],  # smaller seeds would not make a simpler test
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def pairwise(*factors: Iterable[Hashable]) -> list[tuple[Any, ...]]:
    """Return few cases in which any two values of different factors meet.

    Factors of 5, 5 and 6 values need 32 cases instead of 150: a greedy cover, which
    takes the case with the most new pairs each time, and the first of equals.
    """
    missing = {case: set(combinations(enumerate(case), 2)) for case in product(*factors)}
    cover = []
    while any(missing.values()):
        case = max(missing, key=lambda case: len(missing[case]))
        cover.append(case)
        found = missing.pop(case)
        for pairs in missing.values():
            pairs -= found
    return cover


def combine(*factors: Iterable[Hashable]) -> list[tuple[Any, ...]]:
    """Return the `pairwise` cases of the factors, or all of them where examples are random."""
    return list(product(*factors)) if EXAMPLES else pairwise(*factors)


def each_value(*factors: Iterable[Hashable]) -> list[tuple[Any, ...]]:
    """Return as many cases as the longest factor has values, or all where examples are random.

    Every value occurs, in cases as different as possible.
    """
    cases = list(product(*factors))
    if EXAMPLES:
        return cases
    values = set().union(*map(enumerate, cases))
    pairs = set().union(*(combinations(enumerate(case), 2) for case in cases))
    chosen = []
    while values:

        def new(case: tuple[Hashable, ...]) -> tuple[int, int]:
            found = values.intersection(enumerate(case))
            return len(found), len(pairs.intersection(combinations(enumerate(case), 2)))

        chosen.append(max(cases, key=new))
        values.difference_update(enumerate(chosen[-1]))
        pairs.difference_update(combinations(enumerate(chosen[-1]), 2))
    return chosen


GREEDY = SamplingConfig()
SAMPLINGS = {
    "greedy": GREEDY,
    "temperature": SamplingConfig(temperature=1.0, seed=1),
    "top_p": SamplingConfig(temperature=1.0, top_p=0.8, seed=2),
    "top_k": SamplingConfig(temperature=1.0, top_k=5, seed=3),
    "min_p": SamplingConfig(temperature=1.0, min_p=0.1, seed=2**64 - 1),
    "all": SamplingConfig(temperature=1.3, top_k=12, top_p=0.95, min_p=0.02, seed=5),
}
each_sampling = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
two_samplings = pytest.mark.parametrize(
    "sampling", [SAMPLINGS["greedy"], SAMPLINGS["all"]], ids=["greedy", "all"]
)

LOAD = LoadConfig(dtype="float32")
TARGET_SEED, DRAFTER_SEED = 18, 147  # sequences that vary, and drafts that are accepted at times
LAYERS = 3
"""Layers of a target: some have two kinds of them by turns, and drafters read two."""
load_reference = cast(Loader, reference.load)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Pair:
    """One pair of folders, loaded by the backend under test and by the reference."""

    target: Path
    drafter: Path
    tested: Backend
    reference: Backend
    _plain: dict[tuple[tuple[int, ...], DecodeConfig], list[int]] = field(default_factory=dict)
    _found: dict[Callable[[Backend], object], object] = field(default_factory=dict)

    @classmethod
    def load(cls, loader: Loader, target: Path, drafter: Path) -> Pair:
        tested, reference = (make(target, drafter, LOAD) for make in (loader, load_reference))
        return cls(target, drafter, tested, reference)

    @property
    def both(self) -> tuple[Backend, Backend]:
        return self.tested, self.reference

    def plain(self, prompt: Sequence[int], config: DecodeConfig) -> list[int]:
        """Return the tokens of the tested backend's plain decoding, which are decoded once."""
        key = tuple(prompt), replace(config, method="ar", budget=1)
        if key not in self._plain:
            self._plain[key] = generate(self.tested, *key)
        return self._plain[key]

    def once(self, find: Callable[[Backend], Found]) -> Found:
        """Return what a function finds with the tested backend, where it searches once."""
        if find not in self._found:
            self._found[find] = find(self.tested)
        return cast(Found, self._found[find])


PairMaker: TypeAlias = Callable[..., Pair]
"""The fixture `pair`: makes a pair of a family, the suite's first by default.

The keywords `target` and `drafter` have options of `write_target`, and of `write_drafter` or
`write_dialect`.
"""


class Pairs:
    """Makes pairs in a folder, each of them once."""

    def __init__(
        self, folder: Path, loader: Loader, write_target: Callable[..., None] = write_target
    ) -> None:
        self.folder, self.loader, self.write_target = folder, loader, write_target
        self.made: dict[str, Pair] = {}

    def make(
        self, family: str, target: Mapping[str, Any] | None, drafter: Mapping[str, Any] | None
    ) -> Pair:
        key = repr((family, target, drafter))
        if key not in self.made:
            folder = self.folder / str(len(self.made))
            options = {"layers": LAYERS} | dict(target or {})
            self.write_target(folder / "target", family, seed=TARGET_SEED, **options)
            write = write_dialect if drafter and "dialect" in drafter else write_drafter
            write(folder / "drafter", folder / "target", seed=DRAFTER_SEED, **(drafter or {}))
            self.made[key] = Pair.load(self.loader, folder / "target", folder / "drafter")
        return self.made[key]
