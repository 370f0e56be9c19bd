"""Random parameters of sampling."""

import numpy as np

from treeflash.decoding.sampling import LogitEdits, SamplingParams, position_keys
from treeflash.testing.pairs import SAMPLINGS


def random_params(rng, rows, vocab):
    """Any sampling, with or without edits, a mask and log probabilities."""
    sampling = list(SAMPLINGS.values())[rng.integers(len(SAMPLINGS))]
    edits = allowed = log_probs = None
    if rng.random() < 0.5:
        places = rng.choice(rows * vocab, rng.integers(1, rows * vocab), replace=False)
        factors = rng.uniform(0.5, 2, len(places)).astype(np.float32)
        additions = rng.normal(size=len(places)).astype(np.float32)
        edits = LogitEdits(places // vocab, places % vocab, factors, additions)
    if rng.random() < 0.5:
        bits = rng.random((rows, -(-vocab // 32) * 32)) < rng.random()
        bits[np.arange(rows), rng.integers(0, vocab, rows)] = True
        allowed = np.packbits(bits, -1, bitorder="little").view(np.uint32)
    if rng.random() < 0.5:
        log_probs = int(rng.integers(vocab + 2))
    seed = int(rng.integers(2**32))
    keys = None if sampling.greedy else position_keys(seed, np.arange(rows, dtype=np.int32))
    return SamplingParams(sampling, keys, edits, allowed, log_probs)
