import importlib.util
from pathlib import Path

import pytest

from treeflash.testing import require

require("torch")

from transformers import CONFIG_MAPPING


@pytest.fixture(scope="module")
def families():
    """The script `families.py` as a module: it writes random models of any type."""
    path = Path(__file__).parent / "families.py"
    spec = importlib.util.spec_from_file_location("cuda_families", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "layer"),
    [("lfm3", "Lfm3ShortConv"), ("granitemoehybrid", "GraniteMoeHybridMambaLayer")],
)
def test_a_tiny_model_without_a_type_s_recurrent_layers_is_noticed(families, name, layer):
    assert not families.missing_layers(name, families.configuration(name))
    settings = families.SMALL | {"layer_types": ["full_attention"] * families.LAYERS}
    assert layer in families.missing_layers(name, CONFIG_MAPPING[name](**settings))


def test_a_tiny_model_without_sliding_windows_is_noticed(families):
    assert not families.missing_layers("gemma2", families.configuration("gemma2"))
    settings = families.SMALL | {"layer_types": ["full_attention"] * families.LAYERS}
    config = CONFIG_MAPPING["gemma2"](**settings)
    assert families.missing_layers("gemma2", config) == {"sliding_attention"}


def test_a_tiny_model_that_lacks_layers_is_not_tried(families, monkeypatch):
    own = {"layer_types": ["full_attention"] * families.LAYERS}
    monkeypatch.setitem(families.OVERRIDES, "lfm3", own)
    outcome, reason = families.attempt("lfm3")
    assert outcome == "not tried"
    assert "Lfm3ShortConv" in reason
