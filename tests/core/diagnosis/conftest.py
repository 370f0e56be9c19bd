"""Fixtures of the doctor's tests."""

import pytest
from made_up_pairs import VOCAB

from treeflash.testing.models import edit_config, write_drafter, write_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a drafter; its target's folder is beside it."""
    folder = tmp_path_factory.mktemp("pair")
    write_target(folder / "target", "llama", seed=0, vocab_size=VOCAB)
    write_drafter(folder / "drafter", folder / "target", seed=1, target_layer_ids=(1, 2))
    edit_config(folder / "drafter", lambda c: c["dflash_config"].update(mask_token_id=2))
    return folder / "drafter"
