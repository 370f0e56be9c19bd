"""Three tiny models behind one address, whose loads a test can count, hold and let fail."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from byte_tokens import byte_pair
from scripted_model import reference_model
from servers import MAX_POSITIONS, PATIENCE

from treeflash.language_model import LanguageModel, load
from treeflash.serving.models import ModelPool, ModelSpec
from treeflash.serving.settings import Settings

NAMES = ("One", "two", "org/three")
BUNDLED = "SmolLM2"
"""The name of the default pair, in servers that have it too."""


def write_pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Write random pairs of different weights and lengths; returns their folders by name."""
    return {
        name: byte_pair(folder / str(i), seed=20 + i, max_positions=MAX_POSITIONS - i)
        for i, name in enumerate(NAMES)
    }


def load_alone(name: str, pairs: dict[str, tuple[Path, Path]]) -> LanguageModel:
    """Load one of the models, or the default pair."""
    return (
        load(backend="cuda", device="cpu", threads=1)
        if name == BUNDLED
        else reference_model(*pairs[name])
    )


@dataclass
class Loads:
    """Loads the models of a server as its tests want it.

    Attributes:
        capacity: how many models the memory holds; a further load fails for want of memory.
        counts: how often each model was loaded.
        errors: what the next loads of a model raise.
        gates: what the loads of a model wait for.
    """

    pairs: dict[str, tuple[Path, Path]]
    capacity: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    errors: dict[str, list[BaseException]] = field(default_factory=dict)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    begun: Counter[str] = field(default_factory=Counter)
    alive: list[weakref.ref] = field(default_factory=list)

    def load(self, name: str) -> LanguageModel:
        self.begun[name] += 1
        if name in self.gates:
            assert self.gates[name].wait(PATIENCE)
        if self.errors.get(name):
            raise self.errors[name].pop(0)
        if self.capacity is not None and self.living() >= self.capacity:
            raise MemoryError("out of memory")
        model = load_alone(name, self.pairs)
        self.alive.append(weakref.ref(model.backend))
        self.counts[name] += 1
        return model

    def living(self) -> int:
        return sum(backend() is not None for backend in self.alive)


def make_pool(pairs, loads, **settings) -> ModelPool:
    limits = Settings(**settings)
    specs = [
        ModelSpec(
            names=(name,),
            load=lambda name=name: loads.load(name),
            settings=limits,
            defaults={},
            folder=target,
        )
        for name, (target, _) in pairs.items()
    ]
    return ModelPool(specs, limits)
