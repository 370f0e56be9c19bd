"""Block drafters that read a long prompt some positions at a time, in every engine."""

from contextlib import closing
from typing import Any

import numpy as np
import pytest
from recordings import recording
from stand_ins import stand_in

from treeflash.decoding.backend_base import MAX_READ
from treeflash.decoding.interfaces import Prefill

PROMPTS = [5, 6, 7] * 12, [8, 9]  # the draft after the second one follows at once


def check_long_contexts(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Raise unless drafts stay as they are, whatever is read at once, and no product has all rows.

    A CPU's compiled layers, which read all of it, are left out.
    """
    if hasattr(backend.drafter_model, "calls"):
        stand_in(monkeypatch, backend.drafter_model, calls=None)
    drafter, size = backend.drafter, backend.drafter_config.block_size
    attention = backend.drafter_model.layers[0].self_attn
    found = []
    for most in (MAX_READ, 7):
        drafter.max_read = most
        with closing(backend.open(60, drafts=True)) as state:
            for tokens in PROMPTS:
                backend.verifier.run([Prefill(state, tokens, None)])
                with recording(attention, "_heads") as calls:
                    (block,) = drafter.draft([(state, 3)])
                assert max(x.shape[-2] for (x,) in calls) <= most + size
                assert state.drafter.length == state.length
                found.append((drafter.log_probs(block), state.read_drafter_kv_cache()))
    for before, after in zip(found[:2], found[2:], strict=True):
        for x, y in zip(before, after, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
