"""The NumPy backend passes the suite that it is the oracle of."""

import pytest

from treeflash.drafters.folder import read_config, read_tensors
from treeflash.errors import CheckpointError
from treeflash.reference.backend import load as load_reference
from treeflash.reference.target import Target
from treeflash.testing import DIALECTS, HYBRID_FAMILIES, BackendSuite
from treeflash.testing.models import save, write_target


class TestConformance(BackendSuite):
    hybrids = HYBRID_FAMILIES
    dialects = tuple(DIALECTS)

    @pytest.fixture
    def load(self):
        return load_reference


def test_a_missing_tensor_of_a_recurrent_layer_is_named(tmp_path):
    write_target(tmp_path, "granitemoehybrid", seed=0)
    tensors = read_tensors(tmp_path)
    del tensors["model.layers.0.mamba.A_log"]
    save(tmp_path, read_config(tmp_path), tensors)
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.0\.mamba\.A_log$"):
        Target(tmp_path)
