"""Settings are checked where they are made, and the message names the setting and its value."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from treeflash.config import DTYPES, METHODS, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.errors import ConfigError, TreeflashError

NAN, INF = float("nan"), float("inf")

BAD_SAMPLING = [
    ({"temperature": 1e-310}, "temperature must be 0 (greedy), or from 1e-6 to 1e6, got 1e-310"),
    ({"temperature": -0.1}, "temperature must be 0 (greedy), or from 1e-6 to 1e6, got -0.1"),
    ({"temperature": INF}, "temperature must be 0 (greedy), or from 1e-6 to 1e6, got inf"),
    ({"temperature": NAN}, "temperature must be 0 (greedy), or from 1e-6 to 1e6, got nan"),
    ({"top_k": -2}, "top_k must be -1 or more, got -2"),
    ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
    ({"top_p": 1.01}, "top_p must be above 0 and at most 1, got 1.01"),
    ({"top_p": NAN}, "top_p must be above 0 and at most 1, got nan"),
    ({"min_p": -0.5}, "min_p must be between 0 and 1, got -0.5"),
    ({"min_p": 1.5}, "min_p must be between 0 and 1, got 1.5"),
    ({"min_p": NAN}, "min_p must be between 0 and 1, got nan"),
    ({"temperature": None}, "temperature must be 0 (greedy), or from 1e-6 to 1e6, got None"),
    ({"top_k": 1.5}, "top_k must be a whole number, -1 or more, got 1.5"),
    ({"seed": "1"}, "seed must be between 0 and 2**64 - 1, got '1'"),
    ({"seed": -1}, f"seed must be between 0 and 2**64 - 1, got {-1}"),
    ({"seed": 2**64}, f"seed must be between 0 and 2**64 - 1, got {2**64}"),
]
BAD_DECODE = [
    (
        {"method": "beam"},
        "unknown method 'beam'; choose one of ar, dflash, ddtree, treeflash, treeflash-chain, "
        "suffix",
    ),
    ({"budget": 0}, "budget must be auto, or from 1 to 1024 nodes, got 0"),
    ({"budget": 100_000}, "budget must be auto, or from 1 to 1024 nodes, got 100000"),
    ({"budget": True}, "budget must be auto, or from 1 to 1024 nodes, got True"),
    ({"head_vocab": "full"}, "head_vocab must be 1 or more, got 'full'"),
    ({"max_tokens": "16"}, "max_tokens must be 1 or more, got '16'"),
    ({"top_m": 0}, "top_m must be 1 or more, got 0"),
    ({"top_k_children": 0}, "top_k_children must be 1 or more, got 0"),
    ({"draft_temperature": 1e-320}, "draft_temperature must be from 1e-6 to 1e6, got 1e-320"),
    ({"draft_temperature": 1e308}, "draft_temperature must be from 1e-6 to 1e6, got 1e+308"),
    ({"draft_temperature": 0.0}, "draft_temperature must be from 1e-6 to 1e6, got 0.0"),
    ({"draft_temperature": -1.0}, "draft_temperature must be from 1e-6 to 1e6, got -1.0"),
    ({"draft_temperature": INF}, "draft_temperature must be from 1e-6 to 1e6, got inf"),
    ({"draft_temperature": NAN}, "draft_temperature must be from 1e-6 to 1e6, got nan"),
    ({"calibration": "off"}, "calibration must be True or False, got 'off'"),
    ({"max_tokens": 0}, "max_tokens must be 1 or more, got 0"),
    ({"stop_token_ids": [2]}, "stop_token_ids must be a frozenset of token ids, got [2]"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SAMPLING, ids=str)
def test_bad_sampling(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingConfig(**settings)
    assert str(caught.value) == message


def test_a_top_k_of_minus_one_is_off() -> None:
    assert SamplingConfig(temperature=1.0, top_k=-1) == SamplingConfig(temperature=1.0)


@pytest.mark.parametrize(("settings", "message"), BAD_DECODE, ids=str)
def test_bad_decoding(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DecodeConfig(**settings)
    assert str(caught.value) == message


def test_bad_dtype() -> None:
    with pytest.raises(ConfigError) as caught:
        LoadConfig(dtype="int4")
    assert str(caught.value) == "unknown dtype 'int4'; choose one of float32, bfloat16, float16"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": 0}, "device must be the name of a device, such as cpu or cuda:1, got 0"),
        ({"device": ""}, "device must be the name of a device, such as cpu or cuda:1, got ''"),
        ({"draft_bits": 0}, "draft_bits must be 1 or more, got 0"),
        (
            {"device_map": "balanced"},
            "device_map must be auto, or None for one device, got 'balanced'",
        ),
        ({"draft_window": 0}, "draft_window must be 1 or more, got 0"),
        ({"kv_bits": "8"}, "kv_bits must be 1 or more, got '8'"),
    ],
    ids=str,
)
def test_bad_loading(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoadConfig(**settings)
    assert str(caught.value) == message


def test_edges_are_allowed() -> None:
    SamplingConfig(temperature=0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
    SamplingConfig(temperature=1e-6, top_k=10**9, top_p=1e-9, min_p=1.0, seed=2**64 - 1)
    DecodeConfig(budget=1024)
    DecodeConfig(budget=1, top_m=1, top_k_children=1, draft_temperature=1e-3, max_tokens=1)
    for dtype in (None, *DTYPES):
        assert LoadConfig(dtype=dtype).dtype == dtype


def test_a_bad_setting_is_a_value_error_and_ours() -> None:
    with pytest.raises(ValueError, match="budget"):
        DecodeConfig(budget=0)
    with pytest.raises(TreeflashError, match="budget"):
        DecodeConfig(budget=0)


@pytest.mark.parametrize("config", [SamplingConfig, DecodeConfig, LoadConfig])
def test_unknown_settings_raise(config: type) -> None:
    with pytest.raises(TypeError, match="bugdet"):
        config(bugdet=3)


@pytest.mark.parametrize("config", [SamplingConfig, DecodeConfig, LoadConfig])
def test_settings_are_named(config: type) -> None:
    with pytest.raises(TypeError, match="positional"):
        config(1)


def test_settings_are_frozen() -> None:
    config = DecodeConfig()
    with pytest.raises(FrozenInstanceError):
        config.budget = 3  # type: ignore[misc]


def test_replacing_checks_again() -> None:
    with pytest.raises(ConfigError, match="budget"):
        replace(DecodeConfig(), budget=-3)


def test_defaults() -> None:
    config = DecodeConfig()
    assert config.method == "treeflash"
    assert (config.budget, config.top_m, config.top_k_children) == ("auto", 16, 16)
    assert config.draft_temperature == 1
    assert config.sampling == SamplingConfig()
    assert config.sampling.greedy


def test_greedy_is_temperature_zero() -> None:
    assert SamplingConfig(temperature=0, top_k=3, seed=9).greedy
    assert not SamplingConfig(temperature=1e-3).greedy


def test_what_each_method_needs() -> None:
    configs = [DecodeConfig(method=method) for method in METHODS]
    assert [config.drafts for config in configs] == [False, True, True, True, True, False]
    assert [config.uses_head for config in configs] == [False, False, False, True, True, False]
    assert [config.drafts_chain for config in configs] == [False, True, False, False, True, False]
    assert [config.copies for config in configs] == [False, False, True, True, False, True]
    configs = [replace(config, suffix=False) for config in configs]
    assert [config.copies for config in configs] == [False, False, False, False, False, True]
