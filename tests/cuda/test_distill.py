"""Responses to many prompts at once equal plain decoding's, prompt by prompt."""

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_target
from treeflash.testing.pairs import pairwise
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response, respond

require("torch")

import torch
import transformers
from treeflash_cuda.backend import load
from treeflash_cuda.training.entry import train

CPU = LoadConfig(device="cpu", dtype="float32")
STOP = frozenset({3})
SAMPLINGS = (
    SamplingConfig(),
    SamplingConfig(temperature=0.9, seed=3),
    SamplingConfig(temperature=0.9, top_p=0.8, seed=4),
)
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("family", "slots", "prefix"),
    pairwise(["llama", "qwen3", "qwen3_moe", "mistral"], [1, 3, 20], [(), (7, 30, 5, 11)]),
)
def test_responses_equal_plain_decoding(family, slots, prefix, tmp_path):
    write_target(tmp_path, family, seed=1, vocab_size=40)
    random = np.random.default_rng(2)
    requests = [
        request(
            (*prefix, *random.integers(4, 40, length).tolist()),
            SAMPLINGS[n % 3],
            12 if n % 4 else 5,
        )
        for n, length in enumerate([1, 9, 4, 17, 2, 2, 30, 6])
    ]
    lengths = check_responses(load(tmp_path, None, CPU), requests, slots)
    assert len(lengths) > 1, "slots were never freed at different times"


def request(prompt_ids, sampling, max_tokens):
    config = DecodeConfig(
        method="ar", max_tokens=max_tokens, stop_token_ids=STOP, sampling=sampling
    )
    return Request(prompt_ids=prompt_ids, config=config)


def check_responses(backend, requests, slots):
    """Compare with plain decoding of each request alone; returns the lengths of the responses."""
    responses = dict(respond(backend, requests, slots))
    assert responses.keys() == set(range(len(requests)))
    for n, request in enumerate(requests):
        assert responses[n] == generate(backend, request.prompt_ids, request.config), n
    return set(map(len, responses.values()))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("GraniteConfig", {"logits_scaling": 8.0}),
        ("CohereConfig", {"logit_scale": 0.0625}),
    ],
)
def test_scaled_logits_are_sampled_as_the_model_scales_them(kind, settings, tmp_path):
    write_config(tmp_path, kind, **settings)
    samplings = [SamplingConfig(temperature=0.9, seed=n) for n in range(4, 12)]
    requests = [request((5, 9, sampling.seed), sampling, 8) for sampling in samplings]
    check_responses(load(tmp_path, None, CPU), requests, 8)


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    write_config(tmp_path, "NanoChatConfig", final_logit_softcapping=0.5)
    responses = [Response(prompt_ids=(1,), response_ids=(2, 3))]
    config = TrainConfig(layers=1, validation_sequences=0)
    with pytest.raises(UnsupportedModelError, match=r"do more than multiply .* cannot be trained"):
        next(train(tmp_path, responses, tmp_path / "drafter", config, CPU))


def write_config(folder, kind, **settings):
    """Write a tiny random model of a family that scales its logits."""
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**SMALL, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


def test_no_requests_give_no_responses(tmp_path):
    write_target(tmp_path, "llama", seed=1)
    assert list(respond(load(tmp_path, None, CPU), [], 4)) == []
