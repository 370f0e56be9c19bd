"""The backend `cpu`: the backend `cuda` with the device cpu, under a name of its own."""

from pathlib import Path

import pytest

from treeflash.testing import require

torch = require("torch")
from byte_tokens import save_tokenizer
from treeflash_cuda.training import entry

import treeflash
from treeflash import command
from treeflash.config import LoadConfig
from treeflash.decoding.verify_costs import cost_file
from treeflash.errors import BackendError
from treeflash.hub.identity import pair_identity
from treeflash.testing.models import write_pair
from treeflash.training.config import TrainConfig
from treeflash.training.interfaces import trainer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    target, drafter = write_pair(tmp_path_factory.mktemp("pair"), "qwen3", vocab_size=300)
    save_tokenizer(target)
    return target, drafter


def test_both_names_are_one_backend(folders, tmp_path):
    """What is kept on a disk for one of them serves the other."""
    named = [{"backend": "cpu"}, {"backend": "cuda", "device": "cpu"}, {"device": "cpu"}]
    models = [treeflash.load(*folders, **names, dtype="float32") for names in named]
    backends = [model.backend for model in models]
    assert [(one.name, one.device) for one in backends] == [("cpu", "cpu")] * 3
    first, *others = zip(models, backends, strict=True)

    def kept(model, backend):
        costs = cost_file(backend, "a model", model.loaded, tmp_path)
        return costs.path, pair_identity(backend, model.loaded, (*folders, None), tmp_path)

    assert all(kept(*other) == kept(*first) for other in others)
    prompt = [5, 6, 7]
    texts = [model.generate(prompt, max_tokens=8).token_ids for model in models]
    assert texts == [texts[0]] * 3


@pytest.mark.parametrize("arguments", [["generate", "hi"], ["serve"], ["doctor"]])
def test_another_device_is_refused_in_one_line(arguments, folders, capsys):
    target, drafter = map(str, folders)
    models = ["--target", target, "--drafter", drafter, "--backend", "cpu", "--device", "cuda"]
    assert command.main([*arguments, *models]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: the cpu backend runs on the CPU alone, not on 'cuda'; remove the device, or use "
        "the cuda backend"
    )


def test_a_gpu_is_left_alone(see_gpus, folders):
    """Only its name decides, so that what is not there in a build for CPUs is not asked for."""
    see_gpus(1)
    assert treeflash.load(folders[0], False, backend="cpu").backend.device == "cpu"


def test_doctor_names_the_backend_of_a_device(capsys):
    assert command.main(["doctor", "--device-only", "--backend", "cpu"]) == 0
    assert "backend: cpu, device: " in capsys.readouterr().out


def test_training_on_a_cpu_beside_a_gpu(see_gpus, monkeypatch):
    see_gpus(1)
    devices = []
    monkeypatch.setattr(entry, "train", lambda *given: devices.append(given[4].device))
    for name in ("cpu", "cuda", None):
        trainer(name).train(Path(), [], Path(), TrainConfig(), LoadConfig())
    assert devices == ["cpu", None, None]
    with pytest.raises(BackendError, match="remove the device, or use the cuda backend"):
        trainer("cpu").train(Path(), [], Path(), TrainConfig(), LoadConfig(device="cuda:1"))
