"""The script that tries every model type of mlx-lm notices what its tiny models lack."""

from treeflash.testing import require

require("mlx.core")
require("mlx_lm")

ATTENTION_ALONE = ["attention"] * 4


def test_a_tiny_model_without_a_type_s_recurrent_layers_is_noticed(families):
    config = families.configuration("granitemoehybrid")
    assert not families.missing_layers("granitemoehybrid", config)
    config["layer_types"] = ATTENTION_ALONE
    missing = families.missing_layers("granitemoehybrid", config)
    assert "GraniteMoeHybridMamba2Mixer" in missing


def test_a_tiny_model_without_sliding_windows_is_noticed(families):
    """The layers have the same classes; their caches differ."""
    config = families.configuration("gemma3_text")
    assert not families.missing_layers("gemma3_text", config)
    config["sliding_window_pattern"] = 1
    assert families.missing_layers("gemma3_text", config) == {"RotatingKVCache"}


def test_a_tiny_model_without_experts_is_noticed(families):
    assert not families.missing_layers("qwen3_moe", families.configuration("qwen3_moe"))
    config = families.configuration("qwen3_moe") | {"mlp_only_layers": [0, 1, 2, 3]}
    assert "Qwen3MoeSparseMoeBlock" in families.missing_layers("qwen3_moe", config)


def test_a_tiny_model_that_lacks_layers_is_not_tried(families, monkeypatch):
    own = families.OVERRIDES["granitemoehybrid"] | {"layer_types": ATTENTION_ALONE}
    monkeypatch.setitem(families.OVERRIDES, "granitemoehybrid", own)
    outcome, reason = families.attempt("granitemoehybrid")
    assert outcome == "not tried"
    assert "lacks" in reason
