"""Responses of any backend to many prompts at once."""

from __future__ import annotations

import pytest

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.language_model import load
from treeflash.training.interfaces import Request
from treeflash.training.responder import BackendResponder

STOP = frozenset(range(60, 90))


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_responses_are_those_of_plain_decoding(tiny_pair, slots):
    backend = load(tiny_pair[0], False, backend="reference").backend
    requests = [
        Request(
            prompt_ids=tuple(range(4, 5 + 3 * n)),
            sampling=SamplingConfig(temperature=n % 2, seed=n),
            max_tokens=12 if n % 3 else 4,
        )
        for n in range(6)
    ]
    responder = BackendResponder("target", backend)
    assert (responder.target, responder.backend, responder.dtype) == (
        "target",
        "reference",
        "float32",
    )
    found = dict(responder.respond(requests, STOP, slots))
    for n, request in enumerate(requests):
        config = DecodeConfig(
            method="ar",
            max_tokens=request.max_tokens,
            stop_token_ids=STOP,
            sampling=request.sampling,
        )
        expected = [t for step in decode(backend, request.prompt_ids, config) for t in step.tokens]
        assert found[n] == expected
    assert len({len(tokens) for tokens in found.values()}) > 1
