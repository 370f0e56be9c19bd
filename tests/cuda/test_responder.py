"""Responses to many prompts at once equal those of plain decoding, prompt by prompt."""

from dataclasses import replace

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.models import write_target
from treeflash.training.interfaces import Request

require("torch")

import torch  # noqa: E402
import transformers  # noqa: E402
from treeflash_cuda.backend import load  # noqa: E402
from treeflash_cuda.training.entry import responder  # noqa: E402

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


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "mistral"])
@pytest.mark.parametrize("slots", [1, 3, 20])
@pytest.mark.parametrize("prefix", [(), (7, 30, 5, 11)])
def test_responses_equal_plain_decoding(family, slots, prefix, tmp_path):
    write_target(tmp_path, family, seed=1, vocab_size=40)
    random = np.random.default_rng(2)
    requests = [
        Request(
            prompt_ids=(*prefix, *random.integers(4, 40, length).tolist()),
            sampling=SAMPLINGS[n % 3],
            max_tokens=24 if n % 4 else 5,
        )
        for n, length in enumerate([1, 9, 4, 17, 2, 2, 30, 6])
    ]
    responses = dict(responder(tmp_path, CPU).respond(requests, STOP, slots))
    assert responses.keys() == set(range(len(requests)))
    backend = load(tmp_path, None, CPU)
    lengths = set()
    for n, request in enumerate(requests):
        config = DecodeConfig(
            method="ar",
            max_tokens=request.max_tokens,
            stop_token_ids=STOP,
            sampling=request.sampling,
        )
        expected = [t for step in decode(backend, request.prompt_ids, config) for t in step.tokens]
        assert responses[n] == expected, n
        lengths.add(len(expected))
    assert len(lengths) > 1, "slots were never freed at different times"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("GraniteConfig", {"logits_scaling": 8.0}),
        ("CohereConfig", {"logit_scale": 0.0625}),
    ],
)
def test_scaled_logits_are_sampled_as_the_model_scales_them(kind, settings, tmp_path):
    write_config(tmp_path, kind, **settings)
    requests = [
        Request(prompt_ids=(5, 9, n), sampling=replace(SAMPLINGS[1], seed=n), max_tokens=8)
        for n in range(4, 12)
    ]
    responses = dict(responder(tmp_path, CPU).respond(requests, STOP, 8))
    backend = load(tmp_path, None, CPU)
    for n, request in enumerate(requests):
        config = DecodeConfig(
            method="ar", max_tokens=8, stop_token_ids=STOP, sampling=request.sampling
        )
        expected = [t for step in decode(backend, request.prompt_ids, config) for t in step.tokens]
        assert responses[n] == expected, n


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    write_config(tmp_path, "NanoChatConfig", final_logit_softcapping=0.5)
    with pytest.raises(UnsupportedModelError, match=r"do more than multiply .* cannot be trained"):
        responder(tmp_path, CPU)


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
    assert list(responder(tmp_path, CPU).respond([], STOP, 4)) == []
