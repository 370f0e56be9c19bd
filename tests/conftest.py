"""What the tests of both backends share."""

import pytest


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the default target: fetched and converted once, then from the cache."""
    from treeflash.hub.models import resolve_target

    return resolve_target(None)
