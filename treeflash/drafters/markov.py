"""Markov heads (DSpark): a bias on a slot's logits that depends on the token before it.

That of the head `rnn` depends on all tokens of the block before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters.dflash import setting

HEAD_PREFIX = "markov_head."
CONFIDENCE_PREFIX = "confidence_head."
HEADS = ("vanilla", "gated", "rnn")
KEYS = frozenset(
    [
        "confidence_head_alpha",
        "confidence_head_with_markov",
        "enable_confidence_head",
        "markov_head_type",
        "markov_rank",
    ]
)


def head_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `DrafterConfig` for a Markov head; its settings may be in `dflash_config`.

    Raises:
        ValueError: a head that is not supported.
    """
    given = {key: setting(config, key) for key in KEYS}
    rank = int(given["markov_rank"] or 0)
    confidence = bool(given["enable_confidence_head"])
    if not rank:
        if confidence:
            raise ValueError("a confidence head without a Markov head is not supported")
        return {"head": None}
    head = given["markov_head_type"] or "vanilla"
    if head not in HEADS:
        raise ValueError(f"Markov head {head!r} is not supported; known are {', '.join(HEADS)}")
    return {
        "head": head,
        "head_rank": rank,
        "head_state_size": rank if head == "rnn" else 0,
        "confidence_head": confidence,
        "confidence_with_markov": given["confidence_head_with_markov"] is not False,
    }


def head_shapes(config: DrafterConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a head's tensors, by canonical name; `vocab_size` is the target's."""
    h, r = config.hidden_size, config.head_rank
    shapes: dict[str, tuple[int, ...]] = {
        "markov_w1.weight": (vocab_size, r),
        "markov_w2.weight": (config.draft_vocab_size or vocab_size, r),
    }
    if config.head == "gated":
        shapes |= {"gate_proj.weight": (r, h + r), "gate_proj.bias": (r,)}
    if config.head == "rnn":
        shapes |= {"joint_proj.weight": (3 * r, 2 * r + h), "joint_proj.bias": (3 * r,)}
    shapes = {HEAD_PREFIX + name: shape for name, shape in shapes.items()}
    if config.confidence_head:
        width = h + r if config.confidence_with_markov else h
        shapes |= {
            CONFIDENCE_PREFIX + "proj.weight": (1, width),
            CONFIDENCE_PREFIX + "proj.bias": (1,),
        }
    return shapes
