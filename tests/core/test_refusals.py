"""Values of options that are refused: the message from Python, and on the command line."""

from __future__ import annotations

from typing import Any

import pytest

from treeflash.cli.console import Parser
from treeflash.cli.options import add_decode_options, decode_options
from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.errors import ConfigError

NAN, INF = float("nan"), float("inf")
POSITIVE = "must be 1 or more"
RULES: list[tuple[type, str, str, tuple[Any, ...]]] = [
    (
        SamplingConfig,
        "temperature",
        "must be 0 (greedy), or from 1e-6 to 1e6",
        (1e-310, -0.1, INF, NAN, None),
    ),
    (SamplingConfig, "top_k", "must be -1 or more", (-2,)),
    (SamplingConfig, "top_k", "must be a whole number, -1 or more", (1.5,)),
    (SamplingConfig, "top_p", "must be above 0 and at most 1", (0.0, 1.01, NAN)),
    (SamplingConfig, "min_p", "must be between 0 and 1", (-0.5, 1.5, NAN)),
    (SamplingConfig, "seed", "must be between 0 and 2**64 - 1", ("1", -1, 2**64)),
    (DecodeConfig, "budget", "must be auto, or from 1 to 1024 nodes", (0, -3, 100_000, True)),
    (DecodeConfig, "head_vocab", POSITIVE, ("full", -1)),
    (DecodeConfig, "max_tokens", POSITIVE, ("16", 0)),
    (DecodeConfig, "top_m", POSITIVE, (0,)),
    (DecodeConfig, "top_k_children", POSITIVE, (0,)),
    (
        DecodeConfig,
        "draft_temperature",
        "must be from 1e-6 to 1e6",
        (1e-320, 1e308, 0.0, -1.0, INF, NAN),
    ),
    (DecodeConfig, "calibration", "must be True or False", ("off",)),
    (DecodeConfig, "stop_token_ids", "must be a frozenset of token ids", ([2],)),
    (LoadConfig, "device", "must be the name of a device, such as cpu or cuda:1", (0, "")),
    (LoadConfig, "device_map", "must be auto, or None for one device", ("balanced",)),
    (LoadConfig, "draft_bits", POSITIVE, (0,)),
    (LoadConfig, "draft_window", POSITIVE, (0,)),
    (LoadConfig, "kv_bits", POSITIVE, ("8",)),
    (LoadConfig, "memory_gb", "must be above 0", (0, -1.0)),
]
"""By configuration and setting, the rule that a message states, and values that break it."""
CASES = [
    pytest.param(kind, name, value, f"{name} {rule}, got {value!r}", id=f"{name}={value!r}")
    for kind, name, rule, values in RULES
    for value in values
]
NUMBERS = [
    case
    for case in CASES
    if case.values[0] is not LoadConfig
    and type(case.values[2]) in (int, float)
    and case.values[1:3] != ("top_k", 1.5)  # the parser of arguments takes no such number
]


@pytest.mark.parametrize(("kind", "name", "value", "message"), CASES)
def test_a_value_is_refused(kind, name, value, message):
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(("kind", "name", "value", "message"), NUMBERS)
def test_a_value_is_refused_on_the_command_line_before_loading(kind, name, value, message):
    parser = Parser("test", "A test.")
    add_decode_options(parser)
    with pytest.raises(ConfigError) as caught:
        decode_options(parser.parse_args([f"--{name.replace('_', '-')}={value!r}"]))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("kind", "name", "value", "choices"),
    [
        (DecodeConfig, "method", "beam", "ar, dflash, ddtree, treeflash, treeflash-chain, suffix"),
        (LoadConfig, "dtype", "int4", "float32, bfloat16, float16"),
    ],
)
def test_an_unknown_choice_is_refused(kind, name, value, choices):
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    assert str(caught.value) == f"unknown {name} {value!r}; choose one of {choices}"
