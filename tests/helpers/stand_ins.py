"""What stands in the place of parts of a module, a class or an object."""

from __future__ import annotations

from typing import Any

import pytest


def stand_in(patch: pytest.MonkeyPatch, owner: Any, **parts: Any) -> None:
    """Put each part in the place of the owner's attribute of its name, until the patch ends."""
    for name, part in parts.items():
        patch.setattr(owner, name, part)
