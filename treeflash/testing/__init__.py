"""The conformance suite: the contract of a backend, as tests to inherit.

It needs the extra `testing` of treeflash and the framework of the backend under test::

    import pytest
    from treeflash.testing import BackendSuite

    class TestConformance(BackendSuite):
        @pytest.fixture
        def load(self):
            from my_backend import load
            return load
"""

from pkgutil import iter_modules

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in iter_modules(__path__)))

from treeflash.testing.comparisons import Inspectable
from treeflash.testing.models import (
    DIALECTS,
    FAMILIES,
    HYBRID_FAMILIES,
    write_dialect,
    write_drafter,
    write_target,
)
from treeflash.testing.pairs import require
from treeflash.testing.suite import BackendSuite

__all__ = [
    "DIALECTS",
    "FAMILIES",
    "HYBRID_FAMILIES",
    "BackendSuite",
    "Inspectable",
    "require",
    "write_dialect",
    "write_drafter",
    "write_target",
]
