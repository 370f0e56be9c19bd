"""The conformance suite: what a backend must do, as tests to inherit.

It needs pytest, NumPy and safetensors, and the framework of the backend under test::

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

from treeflash.testing.dialects import DIALECTS, write_dialect  # noqa: E402
from treeflash.testing.models import (  # noqa: E402
    FAMILIES,
    HYBRID_FAMILIES,
    write_drafter,
    write_target,
)
from treeflash.testing.require import require  # noqa: E402
from treeflash.testing.suite import BackendSuite  # noqa: E402

__all__ = [
    "DIALECTS",
    "FAMILIES",
    "HYBRID_FAMILIES",
    "BackendSuite",
    "require",
    "write_dialect",
    "write_drafter",
    "write_target",
]
