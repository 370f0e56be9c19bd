"""Tiny random hybrid targets of transformers: drafted text equals what the framework generates."""

import itertools
import json

import numpy as np
import pytest

from treeflash.config import METHODS, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require, write_drafter
from treeflash.testing.comparisons import generate, steps_of, tokens_of
from treeflash.testing.pairs import DRAFTER_SEED
from treeflash.training.distillation import Response

require("torch")

import families
import torch
from fitted_drafters import fit_drafter
from treeflash_cuda.backend import load
from treeflash_cuda.target_loading import load_target
from treeflash_cuda.training.data import FeatureStore

pytestmark = pytest.mark.sample(1)

COMMON = ("qwen3_5", "falcon_h1", "lfm2")
OTHERS = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid", "lara_mini"),
    *("mamba2", "bamba", "granitemoehybrid", "nemotron_h", "zamba2", "lfm2_moe", "lfm3"),
)
VOCAB = 24
PROMPT = np.random.default_rng(5).integers(3, VOCAB, 7).tolist()
SAMPLINGS = (SamplingConfig(), SamplingConfig(temperature=1.0, seed=9))
FLOAT32 = LoadConfig(device="cpu", dtype="float32")
READ_LAYERS = (0, 2)


@pytest.fixture
def model(name, tmp_path, monkeypatch):
    """A target of a type, as transformers loads it."""
    monkeypatch.setitem(families.SMALL, "vocab_size", VOCAB)
    return families.write(tmp_path / "target", name)


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


def generated(model, length):
    """The framework's own greedy text."""
    with torch.inference_mode():
        tokens = model.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return tokens[0, len(PROMPT) :].tolist()


def plain_texts(backend, length):
    """Those that drafts must give, by the ways to choose tokens."""
    configs = (DecodeConfig(method="ar", max_tokens=length, sampling=x) for x in SAMPLINGS)
    return [generate(backend, PROMPT, config) for config in configs]


def fit(drafter, folder, texts):
    """Fit a drafter to texts of the target in a folder."""
    responses = [Response(prompt_ids=tuple(PROMPT), response_ids=tuple(text)) for text in texts]
    target = load_target(folder, FLOAT32, pack=False)
    target.capture(READ_LAYERS)
    store = FeatureStore(target, READ_LAYERS, responses, 1, None, 0)
    features = [text.features.numpy() for text in store.get(range(len(texts)))]
    weights = (x.detach().numpy() for x in (target.embeddings, target.lm_head_weight))
    fit_drafter(drafter, responses, features, *weights, layers=len(target.layers))


def check(folder, model, length, methods, budgets):
    target, drafter = folder / "target", folder / "drafter"
    plain = load(target, None, FLOAT32)
    texts = plain_texts(plain, length)
    assert texts[0] == generated(model, length)
    options = {"seed": DRAFTER_SEED, "target_layer_ids": READ_LAYERS}
    write_drafter(drafter, described(folder, model), **options)
    fit(drafter, target, texts)
    backend = load(target, drafter, FLOAT32)
    for text, sampling in zip(texts, SAMPLINGS, strict=True):
        for method, budget in itertools.product(methods, budgets):
            config = DecodeConfig(
                method=method, budget=budget, max_tokens=length, sampling=sampling
            )
            steps = steps_of(backend, PROMPT, config)
            assert tokens_of(steps) == text, (method, budget)
            efficiency = (len(text) - 1) / (len(steps) - 1)
            # The drafter was fitted to these texts, which seldom repeat what `suffix` could copy.
            assert efficiency > (1 if method == "suffix" else 1.3), (method, budget)


@pytest.mark.parametrize("name", ["kimi_linear", "bailing_hybrid"])
def test_latent_attention_is_refused_by_name(tmp_path, model, name):
    """The recurrent layers could run trees; those with latent keys and values could not."""
    reason = "their layers have keys and values of different shapes"
    with pytest.raises(UnsupportedModelError, match=f"^{name} models cannot .*: {reason}"):
        load(tmp_path / "target", None, FLOAT32)


@pytest.mark.parametrize("name", ["mamba2"])
def test_a_model_may_use_its_cache_as_in_earlier_versions(tmp_path, model, monkeypatch):
    """Before transformers 5.24 it had another name, and was asked otherwise for earlier states."""
    forward = type(model).forward

    def earlier_forward(self, input_ids=None, cache_params=None, **kwargs):
        if cache_params is not None:
            assert not cache_params.has_previous_state()
        return forward(self, input_ids, cache=cache_params, **kwargs)

    monkeypatch.setattr(type(model), "forward", earlier_forward)
    assert load(tmp_path / "target", None, FLOAT32).target.states_nbytes > 0


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", COMMON)
def test_drafted_text_equals_generate(tmp_path, model):
    check(tmp_path, model, 40, ("treeflash", "dflash"), (16,))


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMMON + OTHERS)
def test_long_drafted_text_equals_generate(tmp_path, model):
    check(tmp_path, model, 200, METHODS[1:], (16, 64))
