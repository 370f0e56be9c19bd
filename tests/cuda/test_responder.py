"""Answers to many prompts at once are those that plain decoding gives to each."""

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.testing import require
from treeflash.testing.models import write_target
from treeflash.training import Request

require("torch")

from treeflash_cuda.backend import load  # noqa: E402
from treeflash_cuda.training.entry import responder  # noqa: E402

CPU = LoadConfig(device="cpu", dtype="float32")
STOP = frozenset({3})
SAMPLINGS = (
    SamplingConfig(),
    SamplingConfig(temperature=0.9, seed=3),
    SamplingConfig(temperature=0.9, top_p=0.8, seed=4),
)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "mistral"])
@pytest.mark.parametrize("slots", [1, 3, 20])
@pytest.mark.parametrize("prefix", [(), (7, 30, 5, 11)])
def test_answers_equal_plain_decoding(family, slots, prefix, tmp_path):
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
    answers = dict(responder(tmp_path, CPU).respond(requests, STOP, slots))
    assert answers.keys() == set(range(len(requests)))
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
        assert answers[n] == expected, n
        lengths.add(len(expected))
    assert len(lengths) > 1, "slots were never freed at different times"


def test_nothing_to_answer(tmp_path):
    write_target(tmp_path, "llama", seed=1)
    assert list(responder(tmp_path, CPU).respond([], STOP, 4)) == []
