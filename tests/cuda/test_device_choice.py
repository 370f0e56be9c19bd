"""The device that the PyTorch backend chooses, what it sets up on a GPU, and the backend `cpu`.

The backend `cpu` is the backend `cuda` with the device cpu, under a name of its own.
"""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from byte_tokens import save_tokenizer
from stand_ins import stand_in

import treeflash
from treeflash import command, language_model
from treeflash.config import LoadConfig
from treeflash.decoding.verify_costs import cost_file
from treeflash.errors import BackendError, ConfigError, CPUBuildError
from treeflash.hub.identity import pair_identity
from treeflash.testing import require
from treeflash.testing.models import edit_config, write_pair
from treeflash.training.config import TrainConfig
from treeflash.training.interfaces import trainer

require("torch")

import torch
from treeflash_cuda import target_loading
from treeflash_cuda.backend import load
from treeflash_cuda.device import (
    ALLOCATOR_SETTINGS,
    check_architecture,
    choose_device,
    device_facts,
    join_free_memory,
)
from treeflash_cuda.training import entry

pytestmark = pytest.mark.sample(1)


def test_a_gpus_allocator_joins_free_memory_where_it_can(monkeypatch):
    """Not where a user has other settings, or CUDA runs already."""
    found, on, off = [], "expandable_segments:True", "expandable_segments:False"
    stand_in(monkeypatch, torch._C, _accelerator_setAllocatorSettings=found.append)
    for name in ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)

    def join(message=None, variable=None, initialized=False):
        def empty(*_, **__):
            if message is not None:
                raise RuntimeError(message)

        found.clear()
        with monkeypatch.context() as patch:
            stand_in(patch, torch, empty=empty)
            stand_in(patch, torch.cuda, is_initialized=lambda: initialized)
            if variable is not None:
                patch.setenv(variable, "backend:native")
            join_free_memory(torch.device("cuda"))
        return found

    assert join() == [on]
    assert join("CUDA driver error: operation not supported") == [on, off]
    for variable in ALLOCATOR_SETTINGS:
        assert join(variable=variable) == []
    assert join(initialized=True) == []
    with pytest.raises(RuntimeError, match="out of memory"):
        join("CUDA out of memory")


@pytest.fixture
def lose_gpus(see_gpus, monkeypatch):
    """Let a PyTorch for a version of CUDA find no GPU, with this message."""

    def lose(wheel, message):
        def init():
            if message is not None:
                raise RuntimeError(message)

        see_gpus(0)
        stand_in(monkeypatch, torch.version, cuda=wheel)
        stand_in(monkeypatch, torch.cuda, init=init)

    return lose


TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU "
    "driver by downloading and installing a new version from the URL: ..."
)


@pytest.mark.parametrize(
    ("wheel", "message", "visible", "line"),
    [
        (None, "", None, r"this PyTorch \(.*\) is built for CPUs alone, so .*pytorch.org"),
        (
            "13.0",
            TOO_OLD,
            None,
            "built for CUDA 13.0, and the NVIDIA driver supports only CUDA 12.8, so no CUDA .* or "
            r"update the driver \(580 or newer\), or on a GPU for data centres install NVIDIA's "
            r"cuda-compat-13-0, or install a build for older drivers: pip install "
            r"--force-reinstall 'torch==2.14.\*'.* --index-url .*/whl/cu126$",
        ),
        (
            "13.0",
            TOO_OLD.replace("12080", "11040"),
            None,
            r"supports only CUDA 11.4, so .* or update the driver \(580 or newer\)$",
        ),
        ("13.0", "Found no NVIDIA driver on your system.", None, "this machine has no NVIDIA dr"),
        ("13.0", "No CUDA GPUs are available", "", "CUDA_VISIBLE_DEVICES='' hides every GPU, so"),
        ("13.0", "CUDA unknown error\nSet it up", None, r"does not start \(CUDA unknown error\),"),
        ("13.0", None, None, "counts no device"),
    ],
)
def test_the_line_says_why_there_is_no_cuda_device(
    lose_gpus, monkeypatch, wheel, message, visible, line
):
    lose_gpus(wheel, message)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(BackendError, match=line) as raised:
        choose_device(None)
    assert "no CUDA device is available; use device cpu" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, CPUBuildError) is (wheel is None)
    reason = str(raised.value).partition(", so no CUDA device")[0]
    assert device_facts(torch.device("cpu"))["GPU"] == f"none; {reason}"


@pytest.mark.parametrize(
    ("printed", "older"), [("9.0\n", True), ("8.9\n12.0\n", False), ("10.0\n", False), ("", True)]
)
def test_a_gpu_that_older_builds_do_not_know_needs_a_driver(
    lose_gpus, monkeypatch, tmp_path, printed, older
):
    """PyTorch's last builds for older drivers have code up to Hopper."""
    lose_gpus("13.0", TOO_OLD)
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<END\n{printed}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(BackendError, match=r"update the driver \(580 or newer\)") as raised:
        choose_device("cuda")
    assert ("--force-reinstall" in str(raised.value)) is older


@pytest.mark.parametrize(
    ("capability", "advice"),
    [((7, 0), "--force-reinstall"), ((13, 0), "a newer PyTorch"), ((8, 9), ""), ((12, 1), "")],
)
def test_a_gpu_without_code_is_refused_before_anything_is_read(monkeypatch, capability, advice):
    compiled = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]
    stand_in(
        monkeypatch,
        torch.cuda,
        get_device_capability=lambda device: capability,
        get_device_name=lambda device: "a card",
        get_arch_list=lambda: compiled,
    )
    device = torch.device("cuda")
    if not advice:
        check_architecture(device)
        return
    with pytest.raises(BackendError, match=rf"no code for a card .*{advice}"):
        check_architecture(device)
    compiled.append("compute_120")  # which drivers compile for later GPUs
    with pytest.raises(BackendError) if capability < (12, 0) else nullcontext():
        check_architecture(device)


# Three seconds, for GPUs that are rare.
@pytest.mark.nightly
@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_a_gpu_without_bfloat16_runs_float16(cuda, tmp_path, capability):
    """Such as the T4, which hosted notebooks have; a dtype that is named stays."""
    folders = write_pair(tmp_path, "qwen3", vocab_size=40)
    edit_config(folders[0], lambda config: config.update(dtype="bfloat16"))
    cuda.capability = capability
    said = pytest.warns(UserWarning, match="^fake has no bfloat16, so the models run in float16; ")
    with said if capability < (8, 0) else nullcontext():
        backend = load(*folders, LoadConfig())
    assert backend.dtype == ("float16" if capability < (8, 0) else "bfloat16")
    assert load(*folders, LoadConfig(dtype="float32")).dtype == "float32"


@pytest.mark.parametrize("rounds", [False, True])
def test_products_of_float32_numbers_are_not_tf32(cuda, folders, monkeypatch, rounds):
    """As in NVIDIA's containers, where a variable turns TF32 on."""
    stand_in(monkeypatch, torch.Tensor, __float__=lambda x: 2.0**-12 if rounds else 0.0)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with (
            pytest.raises(BackendError, match=r"TF32 on this GPU; unset NVIDIA_TF32_OVERRIDE")
            if rounds
            else nullcontext()
        ):
            load(*folders, LoadConfig(dtype="float32"))
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_a_gpu_is_prepared_before_anything_uses_it(cuda, folders, monkeypatch):
    """The allocator keeps its settings as soon as CUDA runs; NCCL reads its variable once."""
    seen = []  # the variable where the device is first asked for something

    def asked(device):
        seen.append(os.environ.get("NCCL_GRAPH_REGISTER"))
        return {}

    stand_in(monkeypatch, target_loading, device_facts=asked)
    monkeypatch.delenv("NCCL_GRAPH_REGISTER", raising=False)
    load(*folders, LoadConfig(dtype="float32"))
    assert seen[0] == "0"
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "1")
    load(*folders, LoadConfig(dtype="float32"))
    assert os.environ["NCCL_GRAPH_REGISTER"] == "1"


@pytest.mark.parametrize("name", ["cuda:7", "mps", "tpu", "cpu:x"])
def test_devices_that_are_not_there_are_refused(name, see_gpus):
    see_gpus(2)
    with pytest.raises(BackendError, match=name):
        choose_device(name)


def test_a_missing_gpu_is_said_before_models_are_fetched(see_gpus, monkeypatch):
    see_gpus(0)
    stand_in(monkeypatch, language_model, resolve_target=lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(BackendError, match="no CUDA device is available"):
        treeflash.load("Qwen/Qwen3-8B", backend="cuda")


def test_weights_are_not_rounded_on_a_gpu(tmp_path, see_gpus):
    see_gpus(1)
    reason = r"^weights cannot be rounded to 4 bits on a GPU; choose a target that is quantised"
    with pytest.raises(ConfigError, match=reason):
        load(tmp_path, None, LoadConfig(bits=4))


def test_a_device_is_chosen_by_number(see_gpus):
    see_gpus(2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device(None) == torch.device("cuda", 0)


def test_more_processes_than_devices_are_one_clear_line(monkeypatch, see_gpus):
    see_gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BackendError, match=r"there is no cuda:2: this machine has 2 CUDA device"):
        choose_device(None)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    target, drafter = write_pair(tmp_path_factory.mktemp("pair"), "qwen3", vocab_size=300)
    save_tokenizer(target)
    return target, drafter


def test_both_names_are_one_backend(pair, tmp_path):
    """What is kept on a disk for one of them serves the other."""
    named = [{"backend": "cpu"}, {"backend": "cuda", "device": "cpu"}, {"device": "cpu"}]
    models = [treeflash.load(*pair, **names, dtype="float32") for names in named]
    backends = [model.backend for model in models]
    assert [(one.name, one.device) for one in backends] == [("cpu", "cpu")] * 3
    first, *others = zip(models, backends, strict=True)

    def kept(model, backend):
        costs = cost_file(backend, "a model", model.loaded, tmp_path)
        return costs.path, pair_identity(backend, model.loaded, (*pair, None), tmp_path)

    assert all(kept(*other) == kept(*first) for other in others)
    prompt = [5, 6, 7]
    texts = [model.generate(prompt, max_tokens=8).token_ids for model in models]
    assert texts == [texts[0]] * 3


@pytest.mark.parametrize("arguments", [["generate", "hi"], ["serve"], ["doctor"]])
def test_another_device_is_refused_in_one_line(arguments, pair, capsys):
    target, drafter = map(str, pair)
    models = ["--target", target, "--drafter", drafter, "--backend", "cpu", "--device", "cuda"]
    assert command.main([*arguments, *models]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: the cpu backend runs on the CPU alone, not on 'cuda'; remove the device, or use "
        "the cuda backend"
    )


def test_a_gpu_is_left_alone(see_gpus, pair):
    """Only its name decides, so that what is not there in a build for CPUs is not asked for."""
    see_gpus(1)
    assert treeflash.load(pair[0], False, backend="cpu").backend.device == "cpu"


def test_doctor_names_the_backend_of_a_device(capsys):
    assert command.main(["doctor", "--device-only", "--backend", "cpu"]) == 0
    assert "backend: cpu, device: " in capsys.readouterr().out


def test_training_on_a_cpu_beside_a_gpu(see_gpus, monkeypatch):
    see_gpus(1)
    devices = []
    stand_in(monkeypatch, entry, train=lambda *given: devices.append(given[4].device))
    for name in ("cpu", "cuda", None):
        trainer(name).train(Path(), [], Path(), TrainConfig(), LoadConfig())
    assert devices == ["cpu", None, None]
    with pytest.raises(BackendError, match="remove the device, or use the cuda backend"):
        trainer("cpu").train(Path(), [], Path(), TrainConfig(), LoadConfig(device="cuda:1"))
