"""Rotary frequencies against transformers 5.24 (`ROPE_INIT_FUNCTIONS`, float32)."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from treeflash.drafters.config import inverse_frequencies, rope_parameters
from treeflash.errors import CheckpointError

# Settings, the factor on cosines and sines, and the inverse frequencies; a frequency serves two
# dimensions of a head.
CASES: dict[str, tuple[dict[str, Any], float, list[float]]] = {
    "default": (
        {"rope_type": "default", "rope_theta": 1000000.0},
        1.0,
        [
            1.0,
            0.17782794,
            0.031622779,
            0.0056234132,
            0.001,
            0.00017782794,
            3.1622774e-05,
            5.6234135e-06,
        ],
    ),
    "linear": (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        1.0,
        [0.25, 0.025, 0.0024999999, 0.00025000001],
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        1.0,
        [
            1.0,
            0.19392276,
            0.037606031,
            0.0072926651,
            0.00052484602,
            3.4281024e-05,
            6.6478697e-06,
            1.2891732e-06,
        ],
    ),
    "yarn": (
        {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
        1.138629436111989,
        [
            1.0,
            0.17782794,
            0.031622779,
            0.0042175599,
            0.00050000002,
            4.4456985e-05,
            7.9056936e-06,
            1.4058534e-06,
        ],
    ),
    "yarn with mscale": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
        },
        1.0857263992561355,
        [
            1.0,
            0.31622776,
            0.1,
            0.023914725,
            0.0051249997,
            0.00084986218,
            2.4999999e-05,
            7.9056945e-06,
        ],
    ),
    "yarn untruncated": (
        {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        1.3465735902799727,
        [
            1.0,
            0.225418,
            0.050813273,
            0.0062405132,
            8.0687154e-05,
            1.8188337e-05,
            4.0999785e-06,
            9.2420896e-07,
        ],
    ),
    "yarn with few positions": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        1.138629436111989,
        [1.0, 0.23717082, 0.05, 0.0079056947, 0.0025, 0.00079056947, 0.00025, 7.9056945e-05],
    ),
    "yarn with attention factor": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 2048,
            "attention_factor": 0.5,
        },
        0.5,
        [1.0, 0.1, 0.0074999998, 0.00050000002],
    ),
}


@pytest.mark.parametrize(("settings", "scale", "expected"), CASES.values(), ids=CASES)
def test_frequencies(settings, scale, expected):
    actual, actual_scale = inverse_frequencies(settings, 2 * len(expected))
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert actual_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(("settings", "scale", "expected"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_older_format(settings, scale, expected, type_key):
    """`rope_theta` beside `rope_scaling`, instead of `rope_parameters`."""
    scaling: dict[str, Any] | None = dict(settings)
    config = {"rope_theta": scaling.pop("rope_theta")}
    scaling[type_key] = scaling.pop("rope_type")
    if scaling == {type_key: "default"}:
        scaling = None  # as such files say it
    actual, actual_scale = inverse_frequencies(
        rope_parameters(config | {"rope_scaling": scaling}), 2 * len(expected)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert actual_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(("settings", "scale", "expected"), CASES.values(), ids=CASES)
def test_newer_format(settings, scale, expected):
    config = {"rope_parameters": settings, "max_position_embeddings": 77}
    actual, actual_scale = inverse_frequencies(rope_parameters(config), 2 * len(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert actual_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "theta"),
    [
        ({"rope_theta": 500.0}, 500),
        ({"rope_parameters": {"rope_theta": 600.0, "rope_type": "default"}}, 600),
        ({"rope_parameters": {"rope_theta": 600.0}, "rope_theta": 500.0}, 600),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0}, 500),
        ({"rope_theta": 500.0, "rope_scaling": None, "rope_parameters": None}, 500),
        ({}, 10000),
    ],
    ids=str,
)
def test_base(config, theta):
    parameters = rope_parameters(config)
    assert parameters["rope_theta"] == theta
    assert parameters["rope_type"] == "default"
    frequencies, _ = inverse_frequencies(parameters, 4)
    np.testing.assert_allclose(frequencies, [1, theta**-0.5], rtol=1e-12)


def test_original_length_defaults_to_the_models():
    scaling = {"rope_type": "yarn", "factor": 4.0}
    config = {"rope_theta": 1e6, "rope_scaling": scaling, "max_position_embeddings": 32768}
    frequencies, _ = inverse_frequencies(rope_parameters(config), 16)
    np.testing.assert_allclose(frequencies, CASES["yarn"][2], rtol=1e-6)


def test_settings_are_not_changed():
    config = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0}
    rope_parameters(config)
    assert config == {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0}


def test_unknown_type():
    message = "rope type 'spiral' is not supported; supported are default, linear, llama3 and yarn"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        inverse_frequencies({"rope_type": "spiral", "rope_theta": 1e4}, 8)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("linear", "factor"),
        ("llama3", "factor"),
        ("llama3", "low_freq_factor"),
        ("llama3", "high_freq_factor"),
        ("yarn", "factor"),
    ],
)
def test_missing_setting(kind, missing):
    settings = {name: value for name, value in CASES[kind][0].items() if name != missing}
    message = f"rope type '{kind}' needs '{missing}' in config.json"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        inverse_frequencies(settings, 16)


def test_settings_by_layer_type_are_those_of_full_attention():
    nested = {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 7.0}}
    assert rope_parameters({"rope_parameters": nested})["rope_theta"] == 5.0


def test_a_missing_original_length_is_named():
    settings = {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(CheckpointError, match="original_max_position_embeddings"):
        inverse_frequencies(rope_parameters({"rope_scaling": settings}), 8)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "10000", None, True])
def test_a_base_that_is_not_a_number_above_0(value):
    with pytest.raises(
        CheckpointError, match=r"rope_theta in config\.json must be a number above 0"
    ):
        inverse_frequencies({"rope_type": "default", "rope_theta": value}, 8)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_factor_of_0(kind):
    settings = {
        "rope_type": kind,
        "rope_theta": 1e4,
        "factor": 0,
        "original_max_position_embeddings": 128,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
    }
    with pytest.raises(CheckpointError, match=r"factor in config\.json must be a number above 0"):
        inverse_frequencies(settings, 8)


def test_rope_parameters_count_before_rope_scaling():
    """Transformers 5 writes both into a file that had one of them."""
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    old = {"type": "linear", "factor": 8.0, "rope_theta": 10.0}
    for both in (
        {"rope_parameters": new, "rope_scaling": old, "rope_theta": 7.0},
        {"rope_scaling": old, "rope_theta": 7.0, "rope_parameters": {"full_attention": new}},
        {"rope_scaling": old, "rope_theta": 7.0, "rope_parameters": {"sliding_attention": new}},
    ):
        found = rope_parameters(both)
        assert {name: found[name] for name in new} == new
    assert rope_parameters({"rope_scaling": old})["factor"] == 8.0
    assert rope_parameters({"rope_theta": 7.0})["rope_theta"] == 7.0
    assert rope_parameters({})["rope_theta"] == 10000.0
    for config in (
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"partial_rotary_factor": 0.5}},
    ):
        assert rope_parameters(config)["partial_rotary_factor"] == 0.5
    unset: dict[str, Any] = {"partial_rotary_factor": None}
    assert rope_parameters({**unset, "rope_parameters": unset})["partial_rotary_factor"] == 1
