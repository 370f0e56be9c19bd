"""Which caches a model of mlx-lm asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from treeflash.errors import UnsupportedModelError


@dataclass(frozen=True)
class Attention:
    """The keys and values of a layer, numbered among the attention layers."""

    layer: int


@dataclass(frozen=True)
class Recurrent:
    """The states of a layer, numbered among the recurrent layers."""

    layer: int


Slot: TypeAlias = Attention | Recurrent | tuple["Slot", ...]
"""A cache, or those of a layer that is of both kinds."""


class CacheLayout:
    """The caches of a model, in the order in which it takes them.

    Attributes:
        windows: of the attention layers, in positions; None for one that attends to everything.
        sizes: of the recurrent layers; how many states each has.
        slots: one per cache that the model takes.
    """

    def __init__(self, family: str, caches: Sequence[Any]) -> None:
        """Read the caches that mlx-lm makes.

        Args:
            family: the model type, for errors.
            caches: of `make_prompt_cache`.

        Raises:
            UnsupportedModelError: one is of another kind.
        """
        self.windows: list[int | None] = []
        self.sizes: list[int] = []
        self.slots = [self._slot(family, cache) for cache in caches]

    def make(self, attention: Callable[[int], Any], recurrent: Callable[[int], Any]) -> list[Any]:
        """Caches for one pass, from those of single layers by number."""

        def make(slot: Slot) -> Any:
            if isinstance(slot, tuple):
                return CacheList(*map(make, slot))
            return (attention if isinstance(slot, Attention) else recurrent)(slot.layer)

        return [make(slot) for slot in self.slots]

    def _slot(self, family: str, cache: Any) -> Slot:
        kind = type(cache)
        if kind is CacheList:
            return tuple(self._slot(family, part) for part in cache.caches)
        if kind is ArraysCache:
            self.sizes.append(len(cache.cache))
            return Recurrent(len(self.sizes) - 1)
        if kind is KVCache or (kind is RotatingKVCache and not cache.keep):
            self.windows.append(cache.max_size if kind is RotatingKVCache else None)
            return Attention(len(self.windows) - 1)
        raise UnsupportedModelError(
            f"{family} models keep a state other than plain keys and values ({kind.__name__}), "
            "which a draft tree cannot branch; choose another target"
        )
