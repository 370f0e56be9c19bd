"""Greedy decoding, by every method, against transformers' own `generate`."""

import numpy as np
import pytest

from treeflash.config import METHODS, DecodeConfig, LoadConfig
from treeflash.hub.models import resolve_drafter
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_pair
from treeflash.testing.pairs import pairwise
from treeflash.text.tokenizer import Tokenizer

require("torch")

import torch
from transformers import AutoModelForCausalLM
from treeflash_cuda.backend import load

pytestmark = pytest.mark.sample(2)

CPU = LoadConfig(device="cpu", dtype="float32")
BUDGETS = (1, 2, 16, 64, 256)
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral")
QUESTIONS = (
    "Natalia sold clips to 48 friends in April, and half as many in May. How many in all?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Name three rivers in Europe.",
)


def plain(folder, prompt, max_tokens):
    """What transformers generates, with its own attention and cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


CASES = pairwise(FAMILIES, METHODS, BUDGETS)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_generate_what_transformers_generates(family, tmp_path):
    backend = load(*write_pair(tmp_path, family, vocab_size=40), CPU)
    prompt = np.random.default_rng(3).integers(0, 40, 12).tolist()
    expected = plain(tmp_path / "target", prompt, 24)
    for method, budget in [case[1:] for case in CASES if case[0] == family]:
        config = DecodeConfig(method=method, budget=budget, max_tokens=24)
        assert generate(backend, prompt, config) == expected, (method, budget)


@pytest.fixture(scope="module")
def default_pair(smollm2):
    return load(smollm2, resolve_drafter(None, None), CPU)


# The default target takes long. In every run it is in `tests/conformance/test_published_trees.py`.
@pytest.mark.nightly
@pytest.mark.parametrize("question", QUESTIONS)
def test_smollm2_generates_what_transformers_generates(question, smollm2, default_pair):
    prompt = Tokenizer.from_folder(smollm2).chat([{"role": "user", "content": question}])
    expected = plain(smollm2, prompt, 12)
    for method in METHODS:
        config = DecodeConfig(method=method, budget=64, max_tokens=12)
        assert generate(default_pair, prompt, config) == expected, method
