"""The number of PyTorch's threads: what the user chose, or what other programs leave free."""

import subprocess
import sys

import numpy as np
import pytest

from treeflash.__main__ import main
from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.threads import ProcessorTimes, ThreadPolicy
from treeflash.decoding.tree import DraftTree
from treeflash.processors import QUOTA_FILES, quota, usable_processors
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_pair

require("torch")

import torch
from treeflash_cuda.backend import load
from treeflash_cuda.cpu import threads

PROMPT = list(range(1, 40))


@pytest.fixture
def folders(tmp_path):
    # Large enough for operations to be shared by threads.
    return write_pair(tmp_path, "qwen3", vocab_size=4000, hidden_size=256)


@pytest.fixture(autouse=True)
def _nothing_chosen(own_threads, monkeypatch):
    """A process on three processors that has chosen no threads."""
    monkeypatch.setattr("treeflash.config.most_threads", lambda: 3)
    for variable in threads.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    threads.cpu_threads.cache_clear()
    yield
    threads.cpu_threads.cache_clear()


def shared_machine(others):
    """A policy for two threads; `others` yields the processors in use by others at each pass."""
    seconds, numbers = iter(range(1000)), iter([0.0, *others])
    times = [0.0, 0.0]

    def read():
        times[0] = float(next(seconds))
        times[1] += next(numbers)
        return ProcessorTimes(times[0], times[1], 0.0)

    return ThreadPolicy(2, 2, read, lambda: times[0] + 1)


def test_every_pass_takes_the_threads_that_others_leave_free(folders):
    backend = load(*folders, LoadConfig(device="cpu"))
    backend.target.threads.policy = shared_machine([0, 1, 1, 0])
    counts = []
    layer = backend.target.layers[0]
    layer.register_forward_pre_hook(lambda *_: counts.append(torch.get_num_threads()))
    with SequenceSession(backend, capacity=100) as sequence:
        for _ in range(4):
            sequence.extend(PROMPT[:8])
    assert counts == [2, 1, 1, 2]
    description = "2 of 2; other programs use 0.0 processors"
    assert backend.device_report().facts["threads"] == description


@pytest.mark.sample(1)
@pytest.mark.parametrize("exact", [False, True])
def test_a_change_of_threads_in_a_text_changes_no_token(folders, exact):
    dtype = "bfloat16" if exact else "float32"
    backend = load(*folders, LoadConfig(device="cpu", dtype=dtype, exact=exact or None))
    config = DecodeConfig(method="treeflash", budget=16, max_tokens=8)

    def tokens(policy):
        backend.target.threads.policy = policy
        return generate(backend, PROMPT, config)

    torch.set_num_threads(2)
    expected = tokens(None)
    assert tokens(shared_machine([0, 1] * 100)) == expected
    torch.set_num_threads(1)
    assert tokens(None) == expected


def test_exact_logits_are_bitwise_equal_for_every_number_of_threads(folders):
    backend = load(*folders, LoadConfig(device="cpu", dtype="bfloat16", exact=True))
    backend.target.threads.policy = None

    def logits(number):
        torch.set_num_threads(number)
        with SequenceSession(backend, capacity=100) as sequence:
            sequence.extend(PROMPT)
            return sequence.logits(DraftTree.chain(np.arange(9, dtype=np.int32), np.zeros(9)))

    assert logits(1).tobytes() == logits(2).tobytes() == logits(3).tobytes()


def test_a_chosen_number_stays(folders):
    backend = load(*folders, LoadConfig(device="cpu", threads=3))
    with SequenceSession(backend) as sequence:
        sequence.extend(PROMPT)
    assert torch.get_num_threads() == 3
    assert "3, as chosen" in backend.device_report().facts["threads"]
    # Costs that were measured with other threads are others.
    assert backend.device_name.endswith("3 threads")


@pytest.mark.parametrize(("draft_bits", "expected"), [(None, 1), (16, 3)])
def test_compiled_functions_alone_share_work_if_they_compute_all_products(
    folders, draft_bits, expected
):
    require("llvmlite")
    config = LoadConfig(device="cpu", threads=3, bits=8, draft_bits=draft_bits)
    backend = load(*folders, config)
    generate(backend, PROMPT, DecodeConfig(method="treeflash", budget=8, max_tokens=4))
    assert torch.get_num_threads() == expected
    assert threads.cpu_threads().of_compiled == 3
    assert backend.device_name.endswith("3 threads")
    other = load(folders[0], None, LoadConfig(device="cpu", dtype="float32"))
    generate(other, PROMPT, DecodeConfig(method="ar", max_tokens=1))
    assert torch.get_num_threads() == 3


ONE_OPENMP = """
import os
import sentencepiece
import torch
from treeflash_cuda.cpu.layer_code import LayerKind
from treeflash_cuda.cpu.layer_kernels import layer_kernels
from treeflash_cuda.cpu.threads import cpu_threads

cpu_threads().choose(2)
x = torch.ones(4000, 256)
kernels = layer_kernels(torch.float32, torch.float32, LayerKind(64), (256,))
assert kernels.threads == 2
torch.exp(x)
started = len(os.listdir("/proc/self/task"))
kernels.rms_norm(x, torch.ones(256), 1e-6)
print(len(os.listdir("/proc/self/task")) - started)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="lists threads in /proc")
def test_compiled_functions_run_in_the_threads_of_pytorch_s_operations():
    """Beside a package that loads an OpenMP of its own, whose threads would be further ones."""
    require("llvmlite")
    pytest.importorskip("sentencepiece")
    done = subprocess.run(
        [sys.executable, "-c", ONE_OPENMP], capture_output=True, text=True, check=False
    )
    assert done.stdout == "0\n", done.stderr


@pytest.mark.parametrize("variable", threads.VARIABLES)
def test_a_variable_of_the_environment_is_a_choice(monkeypatch, variable):
    assert threads.Threads().policy is not None
    monkeypatch.setenv(variable, "2")
    assert threads.Threads().policy is None


def test_more_threads_than_processors_are_refused_before_anything_is_loaded(capsys):
    assert main(["generate", "--threads", "1000", "--target", "no such folder", "hi"]) == 2
    assert capsys.readouterr().err == (
        "error: threads must be at most 3, the processors that this process may use, got 1000\n"
    )
    assert LoadConfig(threads=3).threads == 3


@pytest.mark.parametrize("names", QUOTA_FILES, ids=["version 2", "version 1"])
def test_the_limit_of_a_container_counts(tmp_path, names):
    assert quota(8, tmp_path) == 8
    (tmp_path / "cpu").mkdir()
    no_limit = "max" if len(names) == 1 else "-1"
    for allowed, expected in [(no_limit, 8), ("150000", 2), ("1000", 1), ("900000", 8)]:
        lines = [f"{allowed} 100000"] if len(names) == 1 else [allowed, "100000"]
        for name, line in zip(names, lines, strict=True):
            (tmp_path / name).write_text(line + "\n", encoding="ascii")
        assert quota(8, tmp_path) == expected


def test_a_busy_program_is_seen():
    processors = [*usable_processors(), 1 << 20]  # the last one is switched off
    before = threads.read_times(processors)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as program:
        try:
            used = 0.0
            while used < 0.1:
                now = threads.read_times(processors)
                used = (now.busy - before.busy) - (now.own - before.own)
        finally:
            program.kill()
    assert now.elapsed > before.elapsed
    assert now.own > before.own


def test_a_borrowed_model_gives_the_threads_back():
    torch.set_num_threads(2)
    with threads.Threads().borrowed():
        torch.set_num_threads(1)
    assert torch.get_num_threads() == 2
