"""The edges of the filters: where a token is just kept or just dropped, as the core defines."""

from __future__ import annotations

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import position_keys
from treeflash.decoding.sampling import sample_tokens as reference
from treeflash.testing import require

require("torch")

import torch
from treeflash_cuda.sampling import sample_on_cpu, sample_on_gpu

ROWS = 300


@pytest.mark.parametrize("sampler", [sample_on_cpu, sample_on_gpu])
@pytest.mark.parametrize("top_k", [0, 11])
@pytest.mark.parametrize("min_p", [0.0, 0.6])
@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0])
def test_the_edge_of_a_nucleus(sampler, top_k, min_p, scale):
    """In flat distributions tokens of about an equal share of the mass decide the edge."""
    rng = np.random.default_rng(top_k)
    different = 0
    for vocab, top_p in ((7, 0.05), (7, 0.5), (40, 0.3), (40, 0.8), (400, 0.5), (400, 0.99)):
        logits = (scale * rng.normal(size=(ROWS, vocab))).astype(np.float32)
        keys = position_keys(vocab, np.arange(ROWS, dtype=np.int32))
        config = SamplingConfig(temperature=1.0, top_p=top_p, top_k=top_k, min_p=min_p)
        found = sampler(torch.from_numpy(logits), config, keys).tolist()
        assert found == reference(logits, config, keys).tolist(), (vocab, top_p)
        plain = SamplingConfig(temperature=1.0, top_k=top_k, min_p=min_p)
        different += sum(np.array(found) != reference(logits, plain, keys))
    assert different > 10, "the nucleus matters"
