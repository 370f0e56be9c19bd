"""Threads that share one model get the texts that each would get alone."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from parts import load_with_parts

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_pair

require("torch")

from treeflash_cuda.backend import load

THREADS, TEXTS = 4, 12


@pytest.fixture(params=[False, True], ids=["", "static shapes"])
def backend(request, tmp_path, monkeypatch):
    folders = write_pair(tmp_path, "qwen3", vocab_size=40)
    if request.param:
        return load_with_parts(monkeypatch, *folders)
    return load(*folders, LoadConfig(device="cpu", dtype="float32"))


@pytest.fixture
def frequent_switches():
    """Threads that give way far more often than by default."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("frequent_switches")
def test_texts_of_threads_are_those_of_one(backend):
    random = np.random.default_rng(3)
    prompts = [random.integers(0, 40, random.integers(3, 9)).tolist() for _ in range(TEXTS)]
    methods = ["ar", "treeflash", "ddtree"]

    def text(n):
        config = DecodeConfig(method=methods[n % 3], budget=8, max_tokens=24)
        return generate(backend, prompts[n], config)

    alone = [text(n) for n in range(TEXTS)]
    with ThreadPoolExecutor(THREADS) as threads:
        assert list(threads.map(text, range(TEXTS))) == alone
