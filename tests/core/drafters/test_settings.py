"""Settings of published drafters: which of two spellings counts, and what an absent one means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from treeflash.drafters.config import DrafterConfig, rope_parameters
from treeflash.drafters.folder import read_config
from treeflash.drafters.formats import drafter_config, replace_settings
from treeflash.errors import CheckpointError
from treeflash.testing.models import (
    DIALECTS,
    edit_config,
    write_dialect,
    write_drafter,
    write_target,
)

NEW = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
OLD = {"type": "linear", "factor": 8.0, "rope_theta": 10.0}
HEADS = ["dflash", "dflash2", "deepspec", "specforge-domino", "speculators-dflash2"]


@pytest.fixture
def made(tmp_path: Path):
    """Write a drafter of a dialect; returns its folder."""
    write_target(tmp_path / "target", "qwen3", seed=0)

    def write(dialect: str) -> Path:
        if dialect == "treeflash":
            write_drafter(tmp_path / dialect, tmp_path / "target", seed=1)
        else:
            write_dialect(tmp_path / dialect, tmp_path / "target", dialect, seed=1)
        return tmp_path / dialect

    return write


def layers_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that has the settings of the layers."""
    return config.get("transformer_layer_config", config)


def test_rope_parameters_count_before_rope_scaling():
    """Transformers 5 writes both into a file that had one of them."""
    for both in (
        {"rope_parameters": NEW, "rope_scaling": OLD, "rope_theta": 7.0},
        {"rope_scaling": OLD, "rope_theta": 7.0, "rope_parameters": {"full_attention": NEW}},
        {"rope_scaling": OLD, "rope_theta": 7.0, "rope_parameters": {"sliding_attention": NEW}},
    ):
        found = rope_parameters(both)
        assert {name: found[name] for name in NEW} == NEW
    assert rope_parameters({"rope_scaling": OLD})["factor"] == 8.0
    assert rope_parameters({"rope_theta": 7.0})["rope_theta"] == 7.0
    assert rope_parameters({})["rope_theta"] == 10000.0
    for config in (
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"partial_rotary_factor": 0.5}},
    ):
        assert rope_parameters(config)["partial_rotary_factor"] == 0.5
    unset = {"partial_rotary_factor": None}
    assert rope_parameters({**unset, "rope_parameters": unset})["partial_rotary_factor"] == 1


@pytest.mark.parametrize("dialect", HEADS)
def test_rope_parameters_count_in_every_dialect(made, dialect: str):
    folder = made(dialect)

    def set_rope(**settings: Any) -> DrafterConfig:
        def edit(config: dict[str, Any]) -> None:
            for name in ("rope_parameters", "rope_scaling", "rope_theta"):
                layers_of(config).pop(name, None)
            layers_of(config).update(settings)

        edit_config(folder, edit)
        return drafter_config(folder)

    new = set_rope(rope_parameters=NEW).inv_freq
    old = set_rope(rope_scaling=OLD, rope_theta=10.0).inv_freq
    assert new != old
    assert set_rope(rope_parameters=NEW, rope_scaling=OLD, rope_theta=10.0).inv_freq == new


@pytest.mark.parametrize("dialect", ["treeflash", *DIALECTS])
@pytest.mark.parametrize("settings", [{"target_layer_ids": [1, 3]}, {"mask_token_id": 5}])
def test_the_doctor_reads_a_setting_as_it_wrote_it(made, dialect: str, settings: dict[str, Any]):
    """Dialects count layers from different ends of the embeddings."""
    folder = made(dialect)
    before = drafter_config(folder)
    changed = replace_settings(read_config(folder), settings)
    edit_config(folder, lambda config: config.update(changed))
    after = drafter_config(folder)
    for name, value in settings.items():
        assert getattr(after, name) == (tuple(value) if isinstance(value, list) else value)
    for name in ("target_layer_ids", "mask_token_id", "block_size", "first_slot", "head"):
        if name not in settings:
            assert getattr(after, name) == getattr(before, name), name


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


@pytest.mark.parametrize("value", [None, False, True, ...])
@pytest.mark.parametrize("kind", ["dflash", "dflash2", "dspark"])
def test_sliding_layers_of_speculators(made, kind: str, value: object):
    """DFlash2's sliding layers see the whole block unless the file says otherwise."""
    folder = made(f"speculators-{kind}")

    def edit(config: dict[str, Any]) -> None:
        config["transformer_layer_config"].update(SLIDING, use_sliding_window=True)
        config.pop("sliding_window_non_causal", None)
        if value is not ...:
            config["sliding_window_non_causal"] = value

    edit_config(folder, edit)
    config = drafter_config(folder)
    assert config.sliding_windows == (4, None)
    non_causal = value if isinstance(value, bool) else kind == "dflash2"
    assert config.causal == (not non_causal, False)


def test_settings_beside_the_layers_of_speculators(made):
    """Files of versions 0.5 and 0.6, and windows that vLLM reads at the top level first."""
    folder = made("speculators-dflash")
    edit_config(folder, lambda config: config.update(max_anchors=256))
    assert drafter_config(folder).sliding_windows == (3, None)
    edit_config(folder, lambda config: config.update(SLIDING))
    assert drafter_config(folder).sliding_windows == (4, None)
    edit_config(folder, lambda config: config.update(hidden_size=33))
    with pytest.raises(
        CheckpointError, match="hidden_size = 33 contradicts hidden_size = 32 in transformer_layer"
    ):
        drafter_config(folder)


@pytest.mark.parametrize("dialect", ["dflash2", "speculators-dflash2"])
@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("conv_kernel_size", "conv_kernel_size", 2),
        ("conv_group_size", "conv_group_size", 16),
        ("selector_rank", "head_rank", 256),
        ("selector_top_k", "selector_top_k", 16),
    ],
)
def test_absent_settings_of_dflash2_are_those_of_the_published_drafters(
    made, dialect: str, name: str, field: str, value: int
):
    folder = made(dialect)
    sections = ("dflash_config", "selector_config")

    def edit(config: dict[str, Any]) -> None:
        for part in (config, *(config.get(section) or {} for section in sections)):
            if name != "selector_top_k" or dialect.startswith("speculators"):
                part.pop(name, None)
            elif name in part:
                part[name] = None

    edit_config(folder, edit)
    assert getattr(drafter_config(folder), field) == value


def test_the_block_of_speculators_without_its_size(made):
    folder = made("speculators-dflash2")
    edit_config(folder, lambda config: config.pop("block_size"))
    assert drafter_config(folder).block_size == 8


OTHER_ARITHMETIC = {
    "attention_mode": "mla",
    "attention_value_scale": 0.7,
    "dflash_query_causal": True,
    "hidden_act": "gelu",
    "is_neox_style": False,
    "log_snr_conditioning": True,
    "log_snr_embed": True,
    "logits_start": 1,
    "mlp_bias": True,
    "quantization_config": {"bits": 4},
}
"""Settings of published drafters whose arithmetic no backend has."""


@pytest.mark.parametrize("key", OTHER_ARITHMETIC)
def test_settings_of_another_arithmetic_are_refused_wherever_they_stand(made, key: str):
    for dialect, section in (
        ("dflash", None),
        ("dflash", "dflash_config"),
        ("dflash", "treeflash_config"),
        ("deepspec", None),
        ("speculators-dflash", None),
        ("speculators-dflash", "transformer_layer_config"),
    ):
        folder = made(dialect)

        def add(config: dict[str, Any], section: str | None = section) -> None:
            place = config if section is None else config.setdefault(section, {})
            place[key] = OTHER_ARITHMETIC[key]

        edit_config(folder, add)
        with pytest.raises(CheckpointError, match=f"{key} = .* is not supported"):
            drafter_config(folder)


@pytest.mark.parametrize(
    "add", [{"attention_sink_bias": True}, {"use_swa": True, "swa_window_size": 4}]
)
@pytest.mark.parametrize("section", [None, "transformer_layer_config"])
def test_sinks_and_windows_for_all_layers_are_refused_in_speculators(made, add, section):
    folder = made("speculators-dflash")

    def edit(config: dict[str, Any]) -> None:
        (config if section is None else config[section]).update(add)

    edit_config(folder, edit)
    with pytest.raises(CheckpointError, match=f"{next(iter(add))} = True is not supported"):
        drafter_config(folder)


@pytest.mark.parametrize(
    ("architecture", "publisher"),
    [
        ("DFlashLagunaForCausalLM", "poolside's Laguna"),
        ("K3DSparkModel", "DSpark for Kimi K3"),
        ("PEagleDraftModel", "P-EAGLE of SpecForge"),
    ],
)
def test_layouts_of_others_are_refused_by_name(made, architecture: str, publisher: str):
    for dialect in ("dflash", "deepspec", "specforge"):
        folder = made(dialect)
        edit_config(folder, lambda config: config.update(architectures=[architecture]))
        with pytest.raises(CheckpointError, match=f"{architecture} \\({publisher}\\) is not"):
            drafter_config(folder)
