"""Every published format as data: `formats/` has a folder for each dialect.

- `config.json` is a configuration as it is published, for a small target.
- `expected.json` is its meaning: the format's name, and each field of the parsed configuration that
  differs from the field's default. It may have the shapes of some tensors, null for a tensor that
  must be absent, and settings that publishers write and that must be known.
- `refusal.txt`, in place of `expected.json`, is the message about a dialect that is not supported.
- `tensors.json`, if there are any to tell the format, has the canonical name of each stored tensor,
  null for a tensor that is not the drafter's.
- `cases.json` lists other configurations: the settings that each sets and removes, and the changes
  of the parsed fields, or the refusal. A case may have other tensors, with or without their names.
"""

import json
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treeflash.drafters.config import DrafterShape
from treeflash.drafters.folder import open_folder
from treeflash.drafters.format import Format
from treeflash.drafters.formats import (
    SECTIONS,
    parse_drafter_config,
    replace_settings,
    unknown_keys,
)
from treeflash.drafters.loading import parse_folder
from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash.testing.models import save

ROOT = Path(__file__).parent / "formats"
TARGET_LAYERS = 12
DERIVED = ("depths", "has_marginals", "scratch_rows", "column_size", "attention_scale")
"""Properties that `expected.json` has too."""
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


@dataclass
class Dialect:
    """The files of a folder."""

    name: str
    config: dict[str, Any]
    expected: dict[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    names: dict[str, str | None] = field(default_factory=dict)  # canonical, by stored name
    cases: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_block(self) -> bool:
        return "block_size" in self.expected.get("config", {})


def read(folder: Path) -> Dialect:
    parts: dict[str, Any] = {}
    for name, key in (("expected", "expected"), ("tensors", "names"), ("cases", "cases")):
        path = folder / f"{name}.json"
        if path.exists():
            parts[key] = json.loads(path.read_text("utf-8"))
    refusal = folder / "refusal.txt"
    if refusal.exists():
        parts["refusal"] = refusal.read_text("utf-8").rstrip("\n")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return Dialect(name=folder.name, config=config, **parts)


DIALECTS = [read(path.parent) for path in sorted(ROOT.glob("*/config.json"))]
BLOCKS = [dialect for dialect in DIALECTS if dialect.is_block]


def each(dialects: list[Dialect]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dialect", dialects, ids=[x.name for x in dialects])


def case_id(dialect: Dialect, case: dict[str, Any]) -> str:
    edits = [f"{key}={value}" for key, value in case.get("set", {}).items()]
    edits += [f"no {key}" for key in case.get("remove", ())]
    return f"{dialect.name}: {case.get('name') or ' '.join(edits)}"


CASES = [
    pytest.param(dialect, case, id=case_id(dialect, case))
    for dialect in DIALECTS
    for case in dialect.cases
]


def edited(config: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the settings of a case; a dot leads into a section."""
    changed = deepcopy(config)
    for path in case.get("remove", ()):
        *sections, key = path.split(".")
        section = changed
        for name in sections:
            section = section[name]
        del section[key]
    for path, value in case.get("set", {}).items():
        *sections, key = path.split(".")
        section = changed
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return changed


def parse(
    folder: Path, config: dict[str, Any], stored: Iterable[str]
) -> tuple[Format, DrafterShape]:
    tensors = {name: np.zeros(1, np.float32) for name in (*stored, "unrelated")}
    save(folder, config, tensors)
    format_, _, config = parse_folder(open_folder(folder), TARGET_LAYERS)
    return format_, config


def refusal(folder: Path, config: dict[str, Any], stored: Iterable[str]) -> str:
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        parse(folder, config, stored)
    return str(caught.value).replace(f"{folder}/", "")


def plain(value: Any) -> Any:
    """Return a value as JSON has it, with nine digits of each number."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return {k: plain(x) for k, x in value.items()} if isinstance(value, dict) else value


def check(found: DrafterShape, expected: dict[str, Any]) -> None:
    derived = {name: getattr(found, name) for name in DERIVED}
    defaults = {x.name: x.default for x in fields(found) if x.default is not MISSING}
    assert plain(asdict(found) | derived) == plain(defaults) | expected


def check_shapes(format: Format, found: DrafterShape, expected: dict[str, Any]) -> None:
    """Compare the shapes of some tensors; None is for a tensor that the drafter has not."""
    required, optional = format.shapes(found, found.vocab_size or 0, {})
    shapes = plain(required | optional)
    assert {name: shapes.get(name) for name in expected} == expected


def check_names(format: Format, config: dict[str, Any], expected: dict[str, str | None]) -> None:
    found = format.names(config, expected)
    assert {stored: found.get(stored) for stored in expected} == expected


@each(DIALECTS)
def test_meaning(dialect, tmp_path):
    if dialect.refusal is not None:
        assert refusal(tmp_path, dialect.config, dialect.names) == dialect.refusal
        return
    format, found = parse(tmp_path, dialect.config, dialect.names)
    assert format.name == dialect.expected["format"]
    check(found, dialect.expected["config"])
    check_shapes(format, found, dialect.expected.get("shapes", {}))
    check_names(format, dialect.config, dialect.names)


@pytest.mark.parametrize(("dialect", "case"), CASES)
def test_other_settings(dialect, case, tmp_path):
    config, stored = edited(dialect.config, case), case.get("tensors", dialect.names)
    if "refusal" in case:
        assert refusal(tmp_path, config, stored) == case["refusal"]
        return
    format, found = parse(tmp_path, config, stored)
    assert format.name == case.get("format", dialect.expected["format"])
    check(found, dialect.expected["config"] | case["changes"])
    check_shapes(format, found, case.get("shapes", {}))
    if isinstance(case.get("tensors"), dict):
        check_names(format, config, case["tensors"])


@each(BLOCKS)
def test_published_settings_are_known(dialect):
    settings = dict.fromkeys(dialect.expected.get("published", ()))
    assert unknown_keys(settings | dialect.config) == []


def places(dialect: Dialect) -> tuple[str, ...]:
    """Return the prefixes of the settings of a block drafter."""
    if "speculators_model_type" in dialect.config:
        return ("", "transformer_layer_config.")
    return ("", *(f"{section}." for section in SECTIONS))


@each(BLOCKS)
def test_a_setting_that_nothing_reads_is_refused(dialect, tmp_path):
    """At the top level too if the file is no copy of the target's."""
    prefix = "" if "speculators_model_type" in dialect.config else "dflash_config."
    config = edited(dialect.config, {"set": {f"{prefix}norm_power": 0.5}})
    assert refusal(tmp_path, config, dialect.names) == (
        f"config.json is not valid: {prefix}norm_power = 0.5 is not supported; "
        "remove it if it does not change the drafter's output"
    )


@pytest.mark.parametrize("key", OTHER_ARITHMETIC)
@each(BLOCKS)
def test_another_arithmetic_is_refused_wherever_it_is_set(dialect, key, tmp_path):
    for place in places(dialect):
        config = edited(dialect.config, {"set": {f"{place}{key}": OTHER_ARITHMETIC[key]}})
        found = refusal(tmp_path, config, dialect.names)
        assert f"{key} = {OTHER_ARITHMETIC[key]!r} is not supported" in found


@pytest.mark.parametrize(
    "settings",
    [{"target_layer_ids": [1, 3]}, {"mask_token_id": 5}, {"is_causal": True}, {"is_causal": False}],
    ids=str,
)
@each(BLOCKS)
def test_a_replaced_setting_is_read_as_it_was_written(dialect, settings):
    """Dialects count layers from different ends of the embeddings, and name settings otherwise."""
    before = parse_drafter_config(dialect.config)
    after = parse_drafter_config(replace_settings(dialect.config, settings))
    if "is_causal" in settings:
        expected = replace(before, causal=after.causal)
        sliding = [causal for window, causal in after.layer_kinds if window is not None]
        assert set(sliding) <= {settings["is_causal"]}
    else:
        ids = tuple(settings.get("target_layer_ids", before.target_layer_ids))
        mask = settings.get("mask_token_id", before.mask_token_id)
        expected = replace(before, target_layer_ids=ids, mask_token_id=mask)
    assert after == expected
