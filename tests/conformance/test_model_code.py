"""No code of a model folder runs when a part of it is loaded, and no pickle is read."""

import json
import sys
from contextlib import suppress

import pytest
from byte_tokens import save_tokenizer

from treeflash.config import LoadConfig
from treeflash.errors import CheckpointError, TreeflashError
from treeflash.registry import loader
from treeflash.testing import require
from treeflash.testing.models import write_target
from treeflash.text.tokenizer import Tokenizer

require("torch")
require("mlx_lm")

import torch
from mlx_lm import utils
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LOADERS = {
    "tokenizer": Tokenizer.from_folder,
    "cuda": lambda folder: loader("cuda")(folder, None, LoadConfig(device="cpu")),
    "mlx": lambda folder: loader("mlx")(folder, None, LoadConfig()),
}
TRUSTING = {
    "mlx-lm": lambda folder: utils.load_model(folder, trust_remote_code=True),
    **{
        kind.__name__: lambda folder, kind=kind: kind.from_pretrained(
            str(folder), trust_remote_code=True, local_files_only=True
        )
        for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer)
    },
}


CLASSES = {
    "AutoConfig": "evil.Config",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
    "AutoModel": "evil.Model",
    "AutoModelForCausalLM": "evil.Model",
    "AutoProcessor": "evil.Processor",
}
"""What transformers loads from a file of the folder if it trusts the folder."""


def plant_code(folder, *, new_type=False):
    """Map all classes of a model folder to code; returns the file that the code would write.

    With `new_type`, the configuration is of a type that only the code defines.
    """
    ran = folder / "ran"
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        config = json.loads(path.read_text()) if path.exists() else {}
        config["auto_map"] = CLASSES
        if name == "config.json":
            config["model_file"] = "evil.py"  # the name that mlx-lm reads
            if new_type:
                config["model_type"] = "evil"
        elif new_type:
            config["tokenizer_class"] = "EvilTokenizer"
        path.write_text(json.dumps(config))
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import PreTrainedConfig, PreTrainedTokenizerFast\n"
        "class Config(PreTrainedConfig):\n    model_type = 'evil'\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
        "class Model:\n    pass\n"
        "Processor = ModelArgs = Model\n"
    )
    return ran


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model folder; code that runs would be copied next to it."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr("sys.path", [*sys.path])  # transformers appends the folder of modules
    folder = tmp_path / "model"
    folder.mkdir()
    write_target(folder, "llama", seed=1)
    return save_tokenizer(folder)


@pytest.mark.parametrize("new_type", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("part", LOADERS)
def test_code_of_a_folder_is_not_run(folder, part, damaged, new_type):
    """It is not run either when the configuration is read for the cause of another error."""
    ran = plant_code(folder, new_type=new_type)
    if damaged:
        (folder / "tokenizer.json").write_text("{}")
    with suppress(TreeflashError):
        LOADERS[part](folder)
    assert not ran.exists()


@pytest.mark.parametrize("load", TRUSTING.values(), ids=TRUSTING)
def test_the_code_would_run_if_it_were_trusted(folder, load):
    ran = plant_code(folder, new_type=load is not TRUSTING["mlx-lm"])
    with suppress(Exception):
        load(folder)
    assert ran.exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["cuda", "mlx"])
def test_weights_in_pickles_are_not_read(folder, name):
    """Reading a pickle runs what it names."""
    weights, *others = folder.glob("*.safetensors")
    assert not others
    weights.unlink()
    ran = folder / "ran"
    torch.save({"model.norm.weight": Evil(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        LOADERS[name](folder)
    assert not ran.exists()
