"""These tests need torch; what they share is here."""

import pytest

from treeflash.testing import require

require("torch")


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the default target: fetched and converted once, then from the cache."""
    from treeflash.models import resolve_target

    return resolve_target(None)
