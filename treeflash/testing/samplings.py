"""Ways to sample that the suite goes through."""

from __future__ import annotations

from treeflash.config import SamplingConfig

GREEDY = SamplingConfig()
SAMPLINGS = {
    "greedy": GREEDY,
    "temperature": SamplingConfig(temperature=1.0, seed=1),
    "top_p": SamplingConfig(temperature=1.0, top_p=0.8, seed=2),
    "top_k": SamplingConfig(temperature=1.0, top_k=5, seed=3),
    "min_p": SamplingConfig(temperature=1.0, min_p=0.1, seed=2**64 - 1),
    "all": SamplingConfig(temperature=1.3, top_k=12, top_p=0.95, min_p=0.02, seed=5),
}
