"""The same weights in PyTorch and in MLX: identical trees, accepted paths and tokens."""

import json
from itertools import product

import numpy as np
import pytest

from treeflash.config import DecodeConfig
from treeflash.testing import DIALECTS, require, write_drafter, write_target
from treeflash.testing.comparisons import assert_equal_steps, random_tokens, steps_of
from treeflash.testing.models import write_dialect
from treeflash.testing.pairs import DRAFTER_SEED, SAMPLINGS, TARGET_SEED, pairwise

require("torch")
require("mlx_lm")

from both_backends import assert_equal_iterations, load_both

FAMILIES = ("gemma3", "mistral", "llama", "qwen3", "qwen3_moe")
METHODS = ("ar", "dflash", "ddtree", "treeflash", "treeflash-chain")
CASES = pairwise(FAMILIES, METHODS, ("greedy", "all"))
VOCAB_SIZE = 24


# In every run each backend equals the reference in its own suite, and so the other one.
pytestmark = pytest.mark.nightly


@pytest.mark.parametrize("family", FAMILIES)
def test_iterations_are_identical(tmp_path, family):
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    if family == "gemma3":
        write_gemma3(target)
    else:
        write_target(target, family, seed=TARGET_SEED, vocab_size=VOCAB_SIZE)
    write_drafter(drafter, target, seed=DRAFTER_SEED)
    backends = load_both(target, drafter)
    for method, sampling in [case[1:] for case in CASES if case[0] == family]:
        assert_equal_iterations(backends, method, SAMPLINGS[sampling], VOCAB_SIZE)


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_iterations_with_a_dialect_are_identical(tmp_path, dialect):
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    write_target(target, "qwen3", seed=TARGET_SEED, vocab_size=VOCAB_SIZE)
    write_dialect(drafter, target, dialect, seed=DRAFTER_SEED)
    cuda, mlx = load_both(target, drafter)
    prompt = random_tokens(np.random.default_rng(1), VOCAB_SIZE, 9)
    methods = METHODS[1:3] if cuda.head is None else METHODS[1:]
    for method, name in product(methods, ("greedy", "all")):
        sampling = SAMPLINGS[name]
        config = DecodeConfig(method=method, budget=24, max_tokens=16, sampling=sampling)
        assert_equal_steps(
            steps_of(mlx, prompt, config),
            steps_of(cuda, prompt, config),
        )


def write_gemma3(folder):
    """A tiny Gemma 3, made by transformers; its layers slide but for every third."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,  # mlx-lm rounds its root to bfloat16 before it scales the embeddings
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=512,
        sliding_window=8,
        layer_types=[*["sliding_attention"] * 2, "full_attention"] * 2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    # mlx-lm derives the layer types from this number.
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"sliding_window_pattern": 3}))
