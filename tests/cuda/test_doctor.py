"""The doctor on the default pair, which truly drafts; `tests/core` has the checks one by one."""

import pytest

from treeflash.commands.doctor import PROMPTS
from treeflash.config import LoadConfig
from treeflash.diagnosis import diagnose, write_changed
from treeflash.hub.models import resolve_drafter
from treeflash.testing import require
from treeflash.text.prompt import Prompting
from treeflash.text.tokenizer import Tokenizer

require("torch")

from treeflash_cuda.backend import CudaBackend
from treeflash_cuda.drafter_loading import read_drafter
from treeflash_cuda.target_loading import load_target


# The tiny pair passes the same checks.
@pytest.mark.nightly
@pytest.mark.parametrize("settings", [{}, {"mask_token_id": 500}])
def test_the_default_pair(smollm2, tmp_path, settings):
    """Is found sound, and a word in the place of the mask token is not."""
    target = load_target(smollm2, LoadConfig(device="cpu", dtype="float32"), pack=True)

    def load(folder):
        drafter, head = read_drafter(folder, target)
        target.capture(drafter.config.target_layer_ids)
        return CudaBackend(target, drafter, head)

    write_changed(resolve_drafter(None, None), tmp_path, settings)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS[1:2]]
    given = tmp_path, Tokenizer.from_folder(smollm2), prompts
    diagnosis = diagnose(load, *given, prompting=Prompting(), max_tokens=16)
    found = {x.check: x.message for x in diagnosis.findings if not x.ok}
    if settings:
        assert found["mask token"].startswith("mask_token_id ")
        assert found.keys() <= {"mask token", "depths"}
    else:
        assert found == {}
