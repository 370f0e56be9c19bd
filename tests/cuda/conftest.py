"""What tests of the PyTorch backend share."""

import sys

import pytest


@pytest.fixture
def frequent_switches():
    """Threads that give way far more often than by default."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
