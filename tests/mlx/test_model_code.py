"""No code of a model folder runs when its model is loaded with mlx-lm."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hostile_folders import plant_code
from mlx_lm import utils
from treeflash_mlx.backend import load

from treeflash.config import LoadConfig
from treeflash.errors import CheckpointError
from treeflash.testing.models import write_target


@pytest.mark.parametrize("new_type", [False, True])
def test_code_of_a_folder_is_not_run(tmp_path, new_type):
    write_target(tmp_path, "llama", seed=1)
    ran = plant_code(tmp_path, new_type=new_type)
    with pytest.raises(CheckpointError):
        load(tmp_path, None, LoadConfig())
    assert not ran.exists()


def test_the_code_would_run_if_it_were_trusted(tmp_path):
    write_target(tmp_path, "llama", seed=1)
    ran = plant_code(tmp_path)
    with suppress(Exception):
        utils.load_model(tmp_path, trust_remote_code=True)
    assert ran.exists()
