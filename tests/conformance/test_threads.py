"""Threads that share one model get the texts that each would get alone."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from parts import load_with_parts

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.registry import loader
from treeflash.testing import require
from treeflash.testing.comparisons import generate, random_tokens
from treeflash.testing.models import write_pair

pytestmark = pytest.mark.sample(1)

THREADS, TEXTS, VOCAB = 4, 6, 40
METHODS = "ar", "treeflash", "ddtree"


@pytest.fixture(params=["cuda", "cuda on a GPU", "mlx"])
def backend(request, tmp_path, monkeypatch):
    require("mlx_lm" if request.param == "mlx" else "torch")
    folders = write_pair(tmp_path, "qwen3", vocab_size=VOCAB)
    if request.param == "cuda on a GPU":
        return load_with_parts(monkeypatch, *folders)
    return loader(request.param)(*folders, LoadConfig(device="cpu", dtype="float32"))


@pytest.fixture
def frequent_switches():
    """Threads give way far more often than by default, in the middle of forward passes."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("frequent_switches")
def test_texts_of_threads_are_those_of_one(backend):
    rng = np.random.default_rng(3)
    prompts = [random_tokens(rng, VOCAB, int(rng.integers(3, 9))) for _ in range(TEXTS)]

    def text(n):
        sampling = SamplingConfig(temperature=0.8 * (n % 2), seed=5)
        config = DecodeConfig(method=METHODS[n % 3], budget=8, max_tokens=12, sampling=sampling)
        return generate(backend, prompts[n], config)

    alone = [text(n) for n in range(TEXTS)]
    with ThreadPoolExecutor(THREADS) as threads:
        assert list(threads.map(text, range(TEXTS))) == alone
