"""The settings of tests that hypothesis repeats with random texts."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

# The seeds that hypothesis chooses are the same in every run: a near-tie would be one by chance.
repeated = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # smaller arguments would not make a simpler test
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
