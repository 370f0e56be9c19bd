"""What the PyTorch backend tells about its device, and the memory that it sets aside."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
from parts import load_with_parts, use_models
from stand_ins import stand_in

from treeflash.commands import doctor
from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Prefill, Verify, device_report
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.tree import DraftTree
from treeflash.testing import require
from treeflash.testing.models import write_target

require("torch")

import torch
from treeflash_cuda import backend as loading
from treeflash_cuda import memory, target_loading
from treeflash_cuda.cache import Arena
from treeflash_cuda.drafter_loading import load_drafter_operations
from treeflash_cuda.hf import attention_contexts
from treeflash_cuda.operations import CHECKS, Operations

GIB = 1 << 30


def test_a_processor_reports_what_runs_on_it(folders):
    backend = loading.load(*folders, LoadConfig(device="cpu", dtype="float32"))
    report = device_report(backend)
    assert report.facts["torch"] == torch.__version__
    assert "transformers" in report.facts
    assert report.free_bytes is None
    assert not report.kernels
    parameters = [*backend.target.model.parameters(), *backend.drafter_model.parameters()]
    parameters += backend.head.module.parameters()
    expected = {parameter.data_ptr(): parameter.nbytes for parameter in parameters}
    assert report.weights_bytes == sum(expected.values()) > 0


def test_a_gpu_reports_its_card_its_kernels_and_the_memory_set_aside(cuda, folders):
    cuda.free_bytes = 10 * GIB
    backend = loading.load(*folders, LoadConfig(dtype="bfloat16"))
    state = backend.open(40, drafts=True)
    backend.verifier.run([Prefill(state, [3, 4, 5], None)])
    backend.verifier.run([Verify(state, DraftTree.root_only(6), SamplingParams())])
    report = device_report(backend)
    assert (report.facts["device"], report.facts["capability"]) == ("fake", "9.0")
    assert report.facts["memory"] == "10.0 GiB"
    assert report.facts["CUDA"] == torch.version.cuda
    graphs = report.kernels.pop("CUDA graphs")
    assert graphs == {"the target": "used (2 graphs)"}
    # The stand-in has no kernel for sampling. The drafter has heads of another width.
    verdicts = dict.fromkeys(("bfloat16", "bfloat16, drafter"), "used (Triton)")
    assert report.kernels == {name: verdicts for name in CHECKS if name != "sample_rows"}
    assert report.free_bytes == pytest.approx(8.5 * GIB, rel=0.03)


def test_a_drafter_of_other_shapes_has_its_own_operations(cuda, folders, monkeypatch):
    """They are checked at load with its shapes, and reported beside the target's."""
    backend = loading.load(*folders, LoadConfig(dtype="bfloat16"))
    found = []

    def load_operations(shapes, *_):
        found.append(shapes)
        return Operations(reasons={"gated": "ptxas is missing"})

    monkeypatch.setattr(target_loading, "load_operations", load_operations)
    sizes = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    sizes = {name: getattr(backend.target.config, name) for name in sizes}
    config = replace(backend.drafter_config, **sizes)
    operations = load_drafter_operations(config, backend.target, None)
    assert operations is backend.target.operations
    backend.drafter_model.operations = operations
    assert device_report(backend).kernels["gated"] == {"bfloat16": "used (Triton)"}
    config = replace(config, head_dim=64, attention_sinks=True)
    with pytest.warns(UserWarning, match="^in the drafter gated runs in PyTorch: ptxas is missing"):
        own = load_drafter_operations(config, backend.target, None)
    backend.drafter_model.operations = own
    (shapes,) = found
    assert (shapes.heads, shapes.head_dim, shapes.sinks) == (4, 64, True)
    verdicts = device_report(backend).kernels["gated"]
    assert verdicts == {"bfloat16": "used (Triton)", "bfloat16, drafter": "ptxas is missing"}


def test_a_processor_is_examined_without_a_model(capsys):
    assert doctor.main(["--device-only", "--backend", "cuda", "--device", "cpu"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_a_gpu_is_examined_without_a_model(cuda):
    report = loading.examine_device(LoadConfig())
    verdicts = {f"bfloat16, heads of {width}": "used (Triton)" for width in (64, 128, 256)}
    assert report.kernels == {name: verdicts for name in CHECKS if name != "sample_rows"}
    assert report.available_bytes == cuda.free_bytes


@pytest.mark.sample(1)
@pytest.mark.parametrize("runs", [True, False])
def test_passes_over_trees_are_measured_if_the_target_has_them(cuda, tmp_path, monkeypatch, runs):
    use_models(monkeypatch)
    stand_in(monkeypatch, attention_contexts, is_window=lambda *_: runs)
    peaks = {"memory_allocated": lambda _: 2, "max_memory_allocated": lambda _: 5}
    stand_in(monkeypatch, torch.cuda, **peaks)
    write_target(tmp_path, "mistral", seed=1)
    refused = nullcontext() if runs else pytest.warns(UserWarning, match="without CUDA graphs")
    with refused:
        backend = loading.load(tmp_path, None, LoadConfig(dtype="bfloat16"))
    assert memory.pass_nbytes(backend.target) == (3 if runs else 0)


def test_a_kernel_that_fell_back_is_reported_with_its_reason():
    found = Operations(rms_norm=lambda *_: None, reasons={"gated": "ptxas is missing"})
    assert found.verdicts == {"rms_norm": "used (Triton)", "gated": "ptxas is missing"}


@pytest.mark.parametrize(
    ("share", "pass_nbytes", "reserved"),
    [(0.85, 0, 6.8), (0.85, GIB, 5.1), (0.2, GIB, 1.2), (0.85, 5 * GIB, 0)],
)
def test_memory_is_set_aside_beside_the_largest_pass(
    folders, see_memory, share, pass_nbytes, reserved
):
    backend = loading.load(*folders, LoadConfig(device="cpu", dtype="float32"))
    see_memory(8 * GIB, 24 * GIB)
    arenas = backend.target.arena, backend.drafter_arena
    memory.reserve_memory(backend.target, backend.drafter_arena, 2 * pass_nbytes, share)
    assert sum(x.reserved_nbytes for x in arenas) == pytest.approx(reserved * GIB, abs=2)
    columns = [x.reserved_nbytes // x.column_nbytes for x in arenas]
    assert abs(columns[0] - columns[1]) <= 1


@pytest.mark.parametrize(("free", "positions"), [((8, 24), 4), ((24, 2), 2)])
def test_the_gpu_with_the_least_room_decides(folders, see_memory, free, positions):
    """It has a part of the layers, and the first one has the drafter too."""
    gpus = [torch.device("cuda", n) for n in range(2)]
    target = loading.load(folders[0], None, LoadConfig(device="cpu", dtype="float32")).target
    layers, half = target.arena.layers // 2, target.arena.column_nbytes // 2
    drafter = Arena(layers)
    drafter.set_shape(target.arena.like)
    target.device, target.spans = gpus[0], [(gpu, layers) for gpu in gpus]
    free = dict(zip(gpus, free, strict=True))
    see_memory(lambda gpu: free[gpu] * half)
    memory.reserve_memory(target, drafter, 0, 1.0)
    found = [x.reserved_nbytes // x.column_nbytes for x in (target.arena, drafter)]
    assert found == [positions, positions]


@pytest.mark.parametrize("fits", [True, False])
def test_recurrent_states_have_memory_beside_keys_and_values(
    tmp_path, monkeypatch, see_memory, fits
):
    write_target(tmp_path, "qwen3_5", seed=1)
    target = load_with_parts(monkeypatch, tmp_path).target
    wanted = memory.STATES_EACH * memory.STATE_SEQUENCES
    free = (8 * wanted if fits else wanted) * target.states_nbytes
    see_memory(free, free)
    memory.reserve_memory(target, None, 0, 0.5)
    states = wanted if fits else wanted // 4
    assert target.state_arena.slots == states + 1
    assert target.arena.reserved_nbytes == free // 2 - states * target.states_nbytes


def test_a_model_that_its_owner_goes_on_using_keeps_most_memory(cuda, folders):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folders[0], dtype=torch.bfloat16, attn_implementation="eager"
    )
    cuda.free_bytes = 10 * GIB
    report = device_report(loading.wrap(model.to("cuda"), None))
    assert report.free_bytes == pytest.approx(2 * GIB, rel=0.03)
