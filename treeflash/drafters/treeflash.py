"""TreeFlash (arXiv 2606.03819): a DFlash drafter with an AR head.

`config.json` names the head in `treeflash_config.ar_approximation` (older files: at top level), and
its tensors are called `ar_approximation.*`. TreeFlash files put `model.` before the others' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters.backbone import refuse
from treeflash.drafters.dflash import NOT_DFLASH, SECTIONS, parse_backbone, setting

HEADS = ("swiglu", "linear")
HEAD_PREFIX = "ar_approximation."
KEYS = frozenset({"ar_approximation", "candidate_tokens", "treeflash_config"})

Shapes = Mapping[str, tuple[int, ...]]


def parse_config(config: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that a configuration describes; raises what `backbone_config` does."""
    for section in (config, *(dict(config.get(name) or {}) for name in SECTIONS)):
        refuse(section, NOT_DFLASH)
    return parse_backbone(config, head=head_name(config))


def head_name(config: Mapping[str, Any]) -> str | None:
    """The AR head that a configuration asks for: one of `HEADS`, or None for plain DFlash.

    Raises:
        ValueError: another head.
    """
    head = setting(config, "ar_approximation")
    if head not in (None, *HEADS):
        raise ValueError(f"unknown AR head {head!r}; known heads are {', '.join(HEADS)}")
    return None if head is None else str(head)


def head_size(shapes: Shapes) -> int:
    """I, the inner width of the AR head whose tensors have these shapes; 0 without a head."""
    # Either tensor gives the width, so that the other can be reported as missing by name.
    down, bias = (shapes.get(HEAD_PREFIX + name, ()) for name in ("d.weight", "ug.bias"))
    return down[-1] if down else bias[0] // 2 if bias else 0


def head_shapes(head: str | None, hidden_size: int, size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of an AR head's tensors, by name; `size` is I, which only `swiglu` has."""
    h = hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    if head == "swiglu":
        shapes = {
            "ug.weight": (2 * size, 2 * h),
            "ug.bias": (2 * size,),
            "d.weight": (h, size),
            "norm.weight": (h,),
        }
    elif head == "linear":
        shapes = {"d.weight": (h, 2 * h), "norm.weight": (h,)}
    return {HEAD_PREFIX + name: shape for name, shape in shapes.items()}
