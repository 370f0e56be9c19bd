"""Settings are checked where they are made; `test_refusals.py` has the values that are refused."""

from dataclasses import FrozenInstanceError, replace

import pytest

from treeflash.config import DTYPES, METHODS, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.errors import ConfigError, TreeflashError


def test_a_top_k_of_minus_one_is_off():
    assert SamplingConfig(temperature=1.0, top_k=-1) == SamplingConfig(temperature=1.0)


def test_edges_are_allowed():
    SamplingConfig(temperature=0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
    SamplingConfig(temperature=1e-6, top_k=10**9, top_p=1e-9, min_p=1.0, seed=2**64 - 1)
    DecodeConfig(budget=1024)
    DecodeConfig(budget=1, top_m=1, top_k_children=1, draft_temperature=1e-3, max_tokens=1)
    for dtype in (None, *DTYPES):
        assert LoadConfig(dtype=dtype).dtype == dtype


@pytest.mark.parametrize("error", [ValueError, TreeflashError])
def test_a_bad_setting_is_a_value_error_and_ours(error):
    with pytest.raises(error, match="budget"):
        DecodeConfig(budget=0)


@pytest.mark.parametrize("config", [SamplingConfig, DecodeConfig, LoadConfig])
def test_unknown_settings_and_settings_without_a_name_raise(config):
    with pytest.raises(TypeError, match="bugdet"):
        config(bugdet=3)
    with pytest.raises(TypeError, match="positional"):
        config(1)


def test_settings_are_frozen():
    config = DecodeConfig()
    with pytest.raises(FrozenInstanceError):
        config.budget = 3  # type: ignore[misc]


def test_replacing_checks_again():
    with pytest.raises(ConfigError, match="budget"):
        replace(DecodeConfig(), budget=-3)


def test_defaults():
    config = DecodeConfig()
    assert config.method == "treeflash"
    assert (config.budget, config.top_m, config.top_k_children) == ("auto", 16, 16)
    assert config.draft_temperature == 1
    assert config.sampling == SamplingConfig()
    assert config.sampling.greedy


def test_greedy_is_temperature_zero():
    assert SamplingConfig(temperature=0, top_k=3, seed=9).greedy
    assert not SamplingConfig(temperature=1e-3).greedy


def test_what_each_method_needs():
    configs = [DecodeConfig(method=method) for method in METHODS]
    assert [config.drafts for config in configs] == [False, True, True, True, True, False]
    assert [config.uses_head for config in configs] == [False, False, False, True, True, False]
    assert [config.drafts_chain for config in configs] == [False, True, False, False, True, False]
    assert [config.copies for config in configs] == [False, False, True, True, False, True]
    configs = [replace(config, suffix=False) for config in configs]
    assert [config.copies for config in configs] == [False, False, False, False, False, True]
