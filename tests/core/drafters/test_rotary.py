"""Rotary settings of configurations: `rotary.json` has what transformers 5.24 makes of them.

It has settings, the factor on cosines and sines, and the inverse frequencies in float32
(`ROPE_INIT_FUNCTIONS`); a frequency serves two dimensions of a head.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from treeflash.drafters.backbone import inverse_frequencies, rope_parameters
from treeflash.errors import CheckpointError

CASES = json.loads((Path(__file__).parent / "rotary.json").read_text("utf-8"))


def older(settings, key):
    """A configuration with `rope_theta` beside `rope_scaling`, instead of `rope_parameters`."""
    scaling = {x: y for x, y in settings.items() if x not in ("rope_theta", "rope_type")}
    scaling |= {key: settings["rope_type"]}
    none = scaling == {key: "default"}  # as such files say it
    return {"rope_theta": settings["rope_theta"], "rope_scaling": None if none else scaling}


FORMS = {
    "alone": lambda settings: settings,
    "newer": lambda x: rope_parameters({"rope_parameters": x, "max_position_embeddings": 77}),
    "older, type": lambda settings: rope_parameters(older(settings, "type")),
    "older, rope_type": lambda settings: rope_parameters(older(settings, "rope_type")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_frequencies(case, form):
    found, scale = inverse_frequencies(form(case["settings"]), 2 * len(case["inv_freq"]))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, case["inv_freq"], rtol=1e-6)
    assert scale == pytest.approx(case["scale"], rel=1e-12)


NEW = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
OLD = {"type": "linear", "factor": 8.0, "rope_theta": 10.0}
PARTIAL = {"partial_rotary_factor": 0.5}
UNSET = {"partial_rotary_factor": None}
READ = [
    ({"rope_theta": 500.0}, {"rope_theta": 500, "rope_type": "default"}),
    ({"rope_parameters": {"rope_theta": 600.0}, "rope_theta": 500.0}, {"rope_theta": 600}),
    ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0}, {"rope_theta": 500}),
    ({"rope_theta": 5.0, "rope_scaling": None, "rope_parameters": None}, {"rope_theta": 5}),
    ({}, {"rope_theta": 10000, "rope_type": "default"}),
    # Transformers 5 writes both into a file that had one of them; the newer counts.
    ({"rope_parameters": NEW, "rope_scaling": OLD, "rope_theta": 7.0}, NEW),
    ({"rope_scaling": OLD, "rope_parameters": {"full_attention": NEW}}, NEW),
    ({"rope_scaling": OLD, "rope_parameters": {"sliding_attention": NEW}}, NEW),
    ({"rope_parameters": {"full_attention": NEW, "sliding_attention": OLD}}, NEW),
    ({"rope_scaling": OLD}, {"factor": 8.0}),
    (PARTIAL, PARTIAL),
    ({"rope_scaling": PARTIAL}, PARTIAL),
    ({**UNSET, "rope_parameters": UNSET}, {"partial_rotary_factor": 1}),
]


@pytest.mark.parametrize(("config", "expected"), READ, ids=str)
def test_settings_are_found_wherever_a_file_has_them(config, expected):
    before = json.dumps(config)
    found = rope_parameters(config)
    assert {name: found[name] for name in expected} == expected
    assert json.dumps(config) == before, "they are not changed"


def test_original_length_defaults_to_the_models():
    scaling = {"rope_type": "yarn", "factor": 4.0}
    config = {"rope_theta": 1e6, "rope_scaling": scaling, "max_position_embeddings": 32768}
    stretched = {"max_position_embeddings": 131072, "original_max_position_embeddings": 32768}
    for settings in (config, config | stretched):
        found, _ = inverse_frequencies(rope_parameters(settings), 16)
        np.testing.assert_allclose(found, CASES["yarn"]["inv_freq"], rtol=1e-6)


LACKS = [("linear", "factor"), ("llama3", "low_freq_factor"), ("llama3", "high_freq_factor")]
LACKS += [("llama3", "factor"), ("yarn", "factor"), ("yarn", "original_max_position_embeddings")]
BASE = "rope_theta in config.json must be a number above 0"
FACTOR = "factor in config.json must be a number above 0"
REFUSED = [
    (
        {"rope_type": "spiral", "rope_theta": 1e4},
        "rope type 'spiral' is not supported; supported are default, linear, llama3 and yarn",
    ),
    *(
        (
            {key: x for key, x in CASES[kind]["settings"].items() if key != missing},
            f"rope type '{kind}' needs '{missing}' in config.json",
        )
        for kind, missing in LACKS
    ),
    *(
        ({"rope_type": "default", "rope_theta": value}, BASE)
        for value in (0, -1.0, math.inf, math.nan, "10000", None, True)
    ),
    *((CASES[kind]["settings"] | {"factor": 0}, FACTOR) for kind in ("linear", "llama3", "yarn")),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_what_is_refused(settings, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        inverse_frequencies(settings, 16)
