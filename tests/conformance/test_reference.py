"""The NumPy backend passes the suite that it is the oracle of."""

import pytest

from treeflash.reference.backend import load as load_reference
from treeflash.testing import DIALECTS, HYBRID_FAMILIES, BackendSuite


class TestConformance(BackendSuite):
    hybrids = HYBRID_FAMILIES
    dialects = tuple(DIALECTS)

    @pytest.fixture
    def load(self):
        return load_reference
