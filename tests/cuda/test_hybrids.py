"""Tiny random hybrid targets of transformers: drafted text equals what the framework generates."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from treeflash.config import METHODS, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.testing import require, write_drafter
from treeflash.testing.comparisons import tokens_of
from treeflash.testing.pairs import DRAFTER_SEED

require("torch")

import torch  # noqa: E402
from treeflash_cuda.backend import load  # noqa: E402

COMMON = ("qwen3_5", "falcon_h1", "lfm2")
OTHERS = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid", "lara_mini"),
    *("mamba2", "bamba", "granitemoehybrid", "nemotron_h", "zamba2", "lfm2_moe", "lfm3"),
)
VOCAB = 24
PROMPT = 7


@pytest.fixture(scope="module")
def families():
    path = Path(__file__).parent / "families.py"
    spec = importlib.util.spec_from_file_location("cuda_families", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def pair(families, made, name, tmp_path_factory, monkeypatch):
    """A target of a type as transformers loads it, and the pair as the backend does."""
    if name not in made:
        monkeypatch.setitem(families.SMALL, "vocab_size", VOCAB)
        folder = tmp_path_factory.mktemp(name)
        model = families.write(folder / "target", name)
        write_drafter(folder / "drafter", described(folder, model), seed=DRAFTER_SEED)
        made[name] = (
            model,
            load(folder / "target", folder / "drafter", LoadConfig(device="cpu", dtype="float32")),
        )
    return made[name]


def described(folder, model):
    """A folder whose config.json has what a drafter must know of the target."""
    config = model.config.get_text_config()
    settings = {
        "hidden_size": config.hidden_size,
        "vocab_size": VOCAB,
        "num_hidden_layers": config.num_hidden_layers,
        "max_position_embeddings": 512,
    }
    path = folder / "described" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(settings))
    return path.parent


def generated(model, prompt, length):
    """The framework's own greedy text."""
    with torch.inference_mode():
        tokens = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return tokens[0, len(prompt) :].tolist()


def check(pair, length, methods, budgets):
    model, backend = pair
    prompt = np.random.default_rng(5).integers(3, VOCAB, PROMPT).tolist()
    expected = generated(model, prompt, length)
    for sampling in (SamplingConfig(), SamplingConfig(temperature=1.0, seed=9)):
        plain = DecodeConfig(method="ar", max_tokens=length, sampling=sampling)
        text = tokens_of(list(decode(backend, prompt, plain)))
        if sampling.greedy:
            assert text == expected
        for method in methods:
            for budget in budgets:
                config = DecodeConfig(
                    method=method, budget=budget, max_tokens=length, sampling=sampling
                )
                steps = list(decode(backend, prompt, config))
                assert tokens_of(steps) == text, (method, budget)
                # Small trees of a random drafter seldom fit a text that repeats itself.
                if (method, budget) == ("treeflash", max(budgets)):
                    assert (len(text) - 1) / (len(steps) - 1) > 1.1


@pytest.mark.parametrize("name", COMMON)
def test_drafted_text_equals_generate(pair):
    check(pair, 40, ("treeflash", "dflash"), (16,))


@pytest.mark.full
@pytest.mark.parametrize("name", COMMON + OTHERS)
def test_long_drafted_text_equals_generate(pair):
    check(pair, 200, METHODS[1:], (16, 64))
