"""Loading pairs with MLX: refusals, memory limits, the device report and warming up."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain, repeat

import pytest
from failures import failing
from recordings import recording

from treeflash.commands import doctor
from treeflash.config import LoadConfig
from treeflash.errors import BackendError, ConfigError, UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.models import write_drafter

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from mlx import nn
from treeflash_mlx import backend as backend_module
from treeflash_mlx import device
from treeflash_mlx import target as target_module
from treeflash_mlx.backend import load
from treeflash_mlx.drafter_model import TABLE_ROWS, differs


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.Linear])
def test_a_table_equals_the_table_that_was_quantised_from_it(bits, kind):
    """A drafter's copy of the target's table would take memory twice."""
    weight = mx.random.normal((300, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    module = kind(300, 128) if kind is nn.Embedding else kind(128, 300, bias=False)
    module.weight = weight
    quantised = module.to_quantized(64, bits)
    assert not differs(weight, quantised)
    assert not differs(weight.astype(mx.float32), quantised)
    assert differs(mx.roll(weight, 1, 0), quantised)
    assert differs(weight[:200], quantised)
    assert differs(weight[:, :64], quantised)
    assert differs(-weight, quantised)


def test_a_table_with_padding_equals_the_table_that_was_quantised_from_it():
    """All rows that are compared last are 0, and an error relative to them is no number."""
    module = nn.Embedding(TABLE_ROWS + 64, 64)
    module.weight = mx.where(mx.arange(TABLE_ROWS + 64)[:, None] < TABLE_ROWS, module.weight, 0)
    quantised = module.to_quantized(64, 4)
    assert not differs(module.weight, quantised)
    assert differs(module.weight + 1e-3, quantised)


def test_heads_that_cannot_be_quantised_are_refused(families, tmp_path):
    families.write(tmp_path, "llama")
    with pytest.raises(ConfigError, match="multiple of 32"):
        load(tmp_path, None, LoadConfig(kv_bits=8))


def test_missing_device_is_refused(pair, see_device):
    see_device(mx.cpu)
    with pytest.raises(BackendError, match="no GPU"):
        load(*pair, LoadConfig(device="gpu"))
    assert load(*pair, LoadConfig(device="cpu")).device == "cpu"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_experts_in_half_precision_on_a_cpu_are_refused_in_one_line(families, tmp_path, dtype):
    families.write(tmp_path, "qwen3_moe")
    with pytest.raises(ConfigError, match=r"in float32 only; use dtype float32") as caught:
        load(tmp_path, None, LoadConfig(device="cpu", dtype=dtype))
    assert "\n" not in str(caught.value)
    assert load(tmp_path, None, LoadConfig(device="cpu", dtype="float32")).dtype == "float32"


@pytest.mark.parametrize("late", [False, True])
def test_tf32_that_may_be_on_is_one_warning(recwarn, late):
    device.warn_of_tf32(late)
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == late
    assert all("MLX_ENABLE_TF32=0" in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("before", "set_by_user", "late"),
    [("", False, False), ("import mlx.core, ", False, True), ("import mlx.core, ", True, False)],
)
def test_tf32_may_be_on_if_mlx_was_imported_first(before, set_by_user, late):
    """MLX reads the variable once, perhaps before the backend is imported."""
    program = f"{before or 'import '}treeflash_mlx; print(treeflash_mlx.TF32_MAY_BE_ON)"
    env = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    if set_by_user:
        env["MLX_ENABLE_TF32"] = "0"
    run = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(late)


def test_tests_compute_without_tf32():
    """Most of them import MLX before the backend: on a GPU each load in float32 would warn."""
    assert not device.TF32_MAY_BE_ON


class Mac:
    """A Mac with a GPU, of which MLX may use 10 GiB.

    Attributes:
        info: what MLX tells about it.
        outputs: of commands, by their last argument.
        limits: that were set.
    """

    def __init__(self):
        self.info = {
            "device_name": "Apple M4",
            "architecture": "applegpu_g17p",
            "memory_size": 16 << 30,
        }
        self.recommend(10 << 30)
        self.outputs = {}
        self.limits = []

    def recommend(self, nbytes):
        self.info["max_recommended_working_set_size"] = nbytes


@pytest.fixture
def mac(see_device, monkeypatch):
    """The machine is a `Mac`."""
    mac = Mac()
    see_device(mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: mac.info)
    monkeypatch.setattr(mx, "set_cache_limit", lambda n: mac.limits.append(("cache", n)))
    monkeypatch.setattr(mx, "set_wired_limit", lambda n: mac.limits.append(("wired", n)) or 7)
    monkeypatch.setattr(device, "_output", lambda command: mac.outputs.get(command[-1], ""))
    return mac


@pytest.mark.parametrize(("available", "kept"), [(10 << 30, 640 << 20), (64 << 30, 1 << 30)])
def test_freed_memory_is_limited_by_the_size_of_the_gpu(mac, available, kept):
    mac.recommend(available)
    device.limit_cache()
    assert mac.limits == [("cache", kept)]


def test_memory_is_wired_and_given_back_at_exit(mac, monkeypatch):
    at_exit = []
    monkeypatch.setattr(device.atexit, "register", lambda *call: at_exit.append(call))
    device.wire_memory(2 << 30)
    assert mac.limits == [("wired", 7 << 30)]  # weights, states and 1 GiB
    ((restore, previous),) = at_exit
    restore(previous)
    assert mac.limits[-1] == ("wired", 7)
    device.wire_memory(4 << 30)
    assert mac.limits[-1] == ("wired", 9 << 30)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("options", "wired"), [({}, False), ({"wired": True}, True)])
def test_models_are_wired_as_the_configuration_says(pair, monkeypatch, options, wired):
    asked = []
    monkeypatch.setattr(backend_module, "wire_memory", asked.append)
    backend = load(*pair, LoadConfig(**options))
    assert asked == [backend.weights_bytes] * wired


@pytest.mark.parametrize(("weights", "warned"), [(8 << 30, False), (10 << 30, True)])
def test_models_that_leave_no_room_are_a_warning(mac, recwarn, weights, warned):
    """Not models beside which a short context fits."""
    device.warn_of_size(weights)
    messages = [str(warning.message) for warning in recwarn]
    assert (
        messages
        == [
            "the models take 10.0 GiB of the 10.0 GiB that macOS recommends to use on the GPU; "
            "use a smaller model or fewer bits"
        ]
        * warned
    )


@pytest.mark.parametrize(
    ("limit", "force", "refused"), [(0.99, False, True), (0.99, True, False), (1.2, False, False)]
)
def test_models_that_do_not_fit_are_refused_before_they_are_loaded(
    pair, mac, limit, force, refused
):
    size = sum((folder / "model.safetensors").stat().st_size for folder in pair)
    mac.recommend(int(limit * size))
    message = "the models' files have .* use a conversion in fewer bits" if refused else "is loaded"
    with (
        failing(backend_module, "Target", BackendError("it is loaded")),
        pytest.raises(ConfigError if refused else BackendError, match=message),
    ):
        load(*pair, LoadConfig(force=force))
    assert [name for name, _ in mac.limits] == ["cache"]  # before anything is loaded


def test_the_folder_is_not_blamed_for_memory_that_runs_out(pair):
    message = "[METAL] Command buffer execution failed: Insufficient Memory"
    with (
        failing(target_module.utils, "load_model", RuntimeError(message)),
        pytest.raises(RuntimeError, match="Insufficient Memory") as caught,
    ):
        load(*pair, LoadConfig())
    assert str(caught.value) == message


def test_the_report_names_the_machine_and_its_memory(mac, monkeypatch):
    mac.outputs |= {"AGXAccelerator": '    "gpu-core-count" = 40\n', "iogpu.wired_limit_mb": "0\n"}
    monkeypatch.setattr(device.platform, "mac_ver", lambda: ("15.5", (), ""))
    assert device.device_facts() == {
        "chip": "Apple M4",
        "GPU cores": "40",
        "macOS": "15.5",
        "memory": "16 GiB",
        "for the GPU": "10.0 GiB",
        "wired limit": "set by macOS",
        "kernels": "treeflash's for products and attention are not tried on this GPU "
        "(applegpu_g17p); TREEFLASH_UNTRIED_KERNELS=1 in the environment tries them",
    }
    mac.outputs["iogpu.wired_limit_mb"] = "20000\n"
    mac.info["architecture"] = "applegpu_g16p"
    assert device.device_facts()["wired limit"] == "20000 MiB"
    assert "kernels" not in device.device_facts()
    assert device.available_bytes() == 10 << 30


def test_the_report_tells_swap_and_pressure(mac):
    mac.outputs |= {
        "vm.swapusage": "total = 3072.00M  used = 2186.25M  free = 885.75M  (encrypted)\n",
        "kern.memorystatus_vm_pressure_level": "2\n",
    }
    facts = device.device_facts()
    assert (facts["swap in use"], facts["memory pressure"]) == ("2186.25M", "warning")


def test_a_device_without_kernels_is_examined_without_a_model(capsys):
    assert doctor.main(["--backend", "mlx", "--device", "cpu", "--device-only"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("ok       device         chip: ")


def test_the_report_counts_the_weights(pair):
    backend = load(*pair, LoadConfig())
    arrays = [mx.load(str(folder / "model.safetensors")) for folder in pair]
    stored = sum(x.nbytes for tensors in arrays for x in tensors.values())
    assert backend.device_report().weights_bytes == stored
    assert backend.device_report().available_bytes is None
    assert backend.device_report().batches


def test_batches_are_judged_relative_to_another_context_and_more_than_once(
    pair, monkeypatch, caplog
):
    """One line says that there are none."""
    differences = chain([9.0, 0.4, 0.2], repeat(float("nan")))
    monkeypatch.setattr(backend_module, "batch_difference", lambda *_: next(differences))
    assert load(pair[0], None, LoadConfig(dtype="bfloat16")).target.batches
    assert not caplog.records
    backend = load(pair[0], None, LoadConfig(dtype="bfloat16"))
    assert not backend.target.batches
    assert not backend.device_report().batches
    assert [record.getMessage() for record in caplog.records] == [
        "mlx-lm computes other logits for qwen3 models in a batch; sequences run one by one"
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda first, *others: [first, *others], 0),
        (lambda first, *others: [first] * (1 + len(others)), 1),
        (lambda first, *others: [first, *(math.nan * x for x in others)], math.nan),
    ],
    ids=["sound", "the first for all", "not a number"],
)
def test_the_difference_of_a_batch_is_beside_that_of_a_context(
    pair, rng, monkeypatch, change, expected
):
    backend = load(pair[0], None, LoadConfig())
    logits = backend.verifier.logits

    def changed(trees):
        found = logits(trees)
        return replace(found, logits=change(*found.logits))

    monkeypatch.setattr(backend.verifier, "logits", changed)
    found = backend_module.batch_difference(backend, rng)
    assert found == pytest.approx(expected, abs=1e-3, nan_ok=True)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("drafter", "role", "table"),
    [
        ("treeflash", "head", "transitions"),
        ("dflash", "drafter", "marginals"),
        (None, "verifier", "commit"),
    ],
)
def test_a_gpu_is_warmed_up_at_load(pair, tmp_path, drafter, role, table):
    """Everything that an answer needs runs once, so that the first answer compiles nothing."""
    if drafter is not None:
        write_drafter(tmp_path, pair[0], format=drafter, seed=1)
    backend = load(pair[0], None if drafter is None else tmp_path, LoadConfig())
    with (
        recording(type(backend.target), "forward") as passes,
        recording(type(getattr(backend, role)), table) as tables,
    ):
        backend_module.warm_up(backend)
    assert tables
    sizes = [token_ids.shape[1] for _, token_ids, *_ in passes]
    assert sizes.count(backend_module.WARM_NODES) == 2  # copies of the text need trees too
    with recording(type(backend.target), "forward") as passes:
        load(*pair, LoadConfig(device="cpu"))  # which has nothing to compile
    assert backend_module.WARM_NODES not in [token_ids.shape[1] for _, token_ids, *_ in passes]


def test_a_target_that_cannot_run_trees_is_warmed_up_without(families, tmp_path):
    families.write(tmp_path, "ministral3")
    backend = load(tmp_path, None, LoadConfig())
    with recording(type(backend.target), "forward") as passes:
        backend_module.warm_up(backend)
    assert passes
    assert backend_module.WARM_NODES not in [token_ids.shape[1] for _, token_ids, *_ in passes]


def test_a_target_whose_embeddings_are_not_found_decodes_plainly(pair, monkeypatch):
    monkeypatch.setattr(target_module, "EMBEDDINGS", ())
    load(pair[0], None, LoadConfig())
    with pytest.raises(UnsupportedModelError, match=r"^no embedding table was found in the qwen3"):
        load(*pair, LoadConfig())


def test_an_adapter_is_not_merged_into_quantised_layers(quantised_pair, tmp_path):
    matrices = {"a": mx.zeros((128, 2)), "b": mx.zeros((2, 512))}
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_{part}": x for part, x in matrices.items()}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    settings = {"fine_tune_type": "lora", "lora_parameters": {"scale": 1.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    message = f"cannot be merged into {name}: it is quantised; dequantise the target"
    with pytest.raises(UnsupportedModelError, match=message):
        load(quantised_pair[0], None, LoadConfig(adapter=str(tmp_path)))
