"""The list of published drafters against our own parsers: every name has a format that is read.

The names say the formats; a small checkpoint of each format is written and parsed. With a network,
`tox -e nightly` reads the published files themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mtp_pairs import write_mtp_pair, write_peagle_pair

from treeflash.drafters.folder import ModelFolder, StoredTensor, open_folder, read_config
from treeflash.drafters.formats import detect_format
from treeflash.drafters.loading import check_drafter, find_head_format
from treeflash.errors import CheckpointError
from treeflash.hub.published import BUNDLED_DRAFTER, PUBLISHED_DRAFTERS
from treeflash.testing.models import edit_config, write_dialect, write_drafter, write_target

LISTED = {
    rf"treeflash|{BUNDLED_DRAFTER}": "TreeFlash",
    r"\.peagle$": "P-EAGLE",
    r"eagle3": "EAGLE-3",
    r"^google/.*-assistant$": "Gemma 4's assistant",
    r"muse-glimmer.*-assistant$": "Muse Glimmer's assistant",
    r"-speculator\.(dflash2?|dspark)$": "speculators",
    r"_gemma4_": "DeepSpec for Gemma 4",
    r"^deepseek-ai/|^openbmb/|^(dogacel|liquidai)/.*-dspark$": "DeepSpec",
    r"^radixark/": "SpecForge DSpark",
    r"domino": "SpecForge Domino",
    r"dflash2$": "DFlash2",
    r"dflash|^jetspec/": "DFlash",
}
"""The format of a drafter by a part of its name, in lower case; the first that matches counts."""
DRAFTERS = sorted({x.name for drafters in PUBLISHED_DRAFTERS.values() for x in drafters})
Write = Callable[[Path], Path]


def listed_format(name: str) -> str:
    matches = (format_ for part, format_ in LISTED.items() if re.search(part, name.lower()))
    found = next(matches, None)
    assert found is not None, f"{name} is listed, but no part of its name tells its format"
    return found


def block(dialect: str) -> Write:
    def write(folder: Path) -> Path:
        write_target(folder / "target", "qwen3", seed=0)
        if dialect in ("dflash", "treeflash"):
            write_drafter(folder / "drafter", folder / "target", format=dialect, seed=1)
        else:
            write_dialect(folder / "drafter", folder / "target", dialect, seed=1)
        return folder / "drafter"

    return write


def muse(folder: Path) -> Path:
    drafter = block("dflash")(folder)
    changes = {"architectures": ["MuseGlimmerAssistantModel"], "sliding_window": 4}
    edit_config(drafter, lambda config: config.update(changes))
    return drafter


CHECKPOINTS: dict[str, Write] = {
    "TreeFlash": block("treeflash"),
    "DFlash": block("dflash"),
    "DFlash2": block("dflash2"),
    "DeepSpec": block("deepspec"),
    "DeepSpec for Gemma 4": block("deepspec-gemma4"),
    "Muse Glimmer's assistant": muse,
    "SpecForge DSpark": block("specforge"),
    "SpecForge Domino": block("specforge-domino"),
    "speculators": block("speculators-dspark"),
    "EAGLE-3": lambda folder: write_mtp_pair(folder, "eagle3")[1],
    "P-EAGLE": lambda folder: write_peagle_pair(folder)[1],
}
"""Writes a checkpoint of a format, and its target beside it. An assistant needs a Gemma."""


def format_name(folder: ModelFolder) -> str:
    return (find_head_format(folder) or detect_format(folder.config)).name


@pytest.mark.parametrize("name", sorted({*map(listed_format, DRAFTERS)} - {"Gemma 4's assistant"}))
def test_a_listed_format_is_recognised_and_parsed(name, tmp_path):
    drafter = CHECKPOINTS[name](tmp_path)
    assert format_name(open_folder(drafter)) == name
    assert check_drafter(drafter, read_config(tmp_path / "target")) is not None


def test_gemma_4s_assistant_is_recognised():
    stored = StoredTensor(Path("model.safetensors"), "BF16", (1,))
    folder = ModelFolder(Path(), {"model_type": "gemma4_assistant"}, {"norm.weight": stored})
    assert format_name(folder) == "Gemma 4's assistant"


@pytest.mark.nightly
@pytest.mark.parametrize("name", [x for x in DRAFTERS if x != BUNDLED_DRAFTER])
def test_a_published_drafter_has_the_listed_format(name):
    """From its configuration and the headers of its files alone; a gated one is skipped."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        config: dict[str, Any] = json.loads(Path(hf_hub_download(name, "config.json")).read_text())
        metadata = HfApi().get_safetensors_metadata(name)
    except (OSError, HfHubHTTPError) as error:
        pytest.skip(f"{name} cannot be read: {error}")
    tensors = {
        tensor: StoredTensor(Path(file), info.dtype, tuple(info.shape))
        for file, part in metadata.files_metadata.items()
        for tensor, info in part.tensors.items()
    }
    folder = ModelFolder(Path(name), config, tensors)
    assert format_name(folder) == listed_format(name)
    format_ = find_head_format(folder) or detect_format(config)
    layers = config.get("num_target_layers") or 64
    try:
        format_.parse(config, tensors, layers)
    except (CheckpointError, KeyError, ValueError) as error:
        pytest.fail(f"{name} is listed, but cannot be read: {error}")
