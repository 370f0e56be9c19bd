"""How a third party runs the suite; not named test_*, as it needs the package installed."""

import pytest

from treeflash.registry import loader
from treeflash.testing import BackendSuite


class TestConformance(BackendSuite):
    families = ("llama",)

    @pytest.fixture
    def load(self):
        return loader("example")
