"""Which drafter belongs to a target, how it was trained, and the list of published drafters.

With a network, the nightly run reads the published files themselves.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from treeflash.drafters.folder import ModelFolder, StoredTensor
from treeflash.drafters.formats import detect_format
from treeflash.drafters.loading import find_head_format
from treeflash.errors import CheckpointError
from treeflash.hub import models, published
from treeflash.hub.published import (
    BUNDLED_DRAFTER,
    DEEPSPEC_SYSTEM,
    PUBLISHED_DRAFTERS,
    PublishedDrafter,
)


@pytest.mark.parametrize(
    ("target", "drafter"),
    [
        ("Qwen/Qwen3-4B", "peerrh/treeflash-qwen3-4b"),
        ("qwen/qwen3-8b", "peerrh/treeflash-qwen3-8b"),
        ("Qwen/Qwen3-14B", "deepseek-ai/dspark_qwen3_14b_block7"),
        ("/data/models/Qwen3-Coder-30B-A3B-Instruct/", "peerrh/treeflash-qwen3-coder-30b-a3b"),
        ("mlx-community/Qwen3-4B-4bit", "peerrh/treeflash-qwen3-4b"),
        ("Qwen/Qwen3-4B-MLX-4bit", "peerrh/treeflash-qwen3-4b"),
        ("mlx-community/Qwen3-8B-4bit-DWQ-053125", "peerrh/treeflash-qwen3-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat"),
        ("mlx-community/gpt-oss-20b-MXFP4-Q8", "z-lab/gpt-oss-20b-DFlash"),
        ("mlx-community/gpt-oss-20b-mxfp8", "z-lab/gpt-oss-20b-DFlash"),
        ("some/gpt-oss-120b-4bit-AWQ", "z-lab/gpt-oss-120b-DFlash"),
        ("some/gpt-oss-20b-OptiQ-4bit", "z-lab/gpt-oss-20b-DFlash"),
        ("LiquidAI/LFM2.5-8B-A1B", "LiquidAI/LFM2.5-8B-A1B-DSpark"),
        ("RedHatAI/Qwen3-235B-A22B-NVFP4", "RedHatAI/Qwen3-235B-A22B-speculator.eagle3"),
        ("/models/Qwen3-4B-Q4_K_M", "peerrh/treeflash-qwen3-4b"),
        ("/models/Qwen3-8B.IQ3_XXS", "peerrh/treeflash-qwen3-8b"),
        ("/models/Qwen3-14B-F16", "deepseek-ai/dspark_qwen3_14b_block7"),
        ("hf.co/Qwen/Qwen3-14B-GGUF:Q4_K_M", "deepseek-ai/dspark_qwen3_14b_block7"),
        ("/models/Qwen3-4B-Q4_K_M.gguf", "peerrh/treeflash-qwen3-4b"),
        ("/models/Qwen3-4B-UD-Q4_K_XL.gguf", "peerrh/treeflash-qwen3-4b"),
        ("/models/Qwen3-8B.i1-Q4_K_M.gguf", "peerrh/treeflash-qwen3-8b"),
        ("/models/lmstudio-community/Qwen3-8B-GGUF", "peerrh/treeflash-qwen3-8b"),
        ("Qwen/Qwen3-8B-FP8", "peerrh/treeflash-qwen3-8b"),
        ("Qwen/Qwen3-8B-AWQ", "peerrh/treeflash-qwen3-8b"),
        ("JunHowie/Qwen3-8B-GPTQ-Int4", "peerrh/treeflash-qwen3-8b"),
        ("Qwen/Qwen3-4B-Base", None),
        ("/hub/models--Qwen--Qwen3-14B/snapshots/0a1b", "deepseek-ai/dspark_qwen3_14b_block7"),
    ],
)
def test_published_drafters(target, drafter):
    assert published.published_drafter(target) == drafter


@pytest.mark.parametrize(
    ("card", "drafter"),
    [
        ("library_name: mlx\nbase_model: Qwen/Qwen3-4B\n", "peerrh/treeflash-qwen3-4b"),
        (
            "base_model:\n- Qwen/Qwen3-8B\nbase_model_relation: quantized\n",
            "peerrh/treeflash-qwen3-8b",
        ),
        ("library_name: transformers\nbase_model: Qwen/Qwen3-4B\n", None),  # trained further
        ("library_name: mlx\n", None),
    ],
)
def test_the_card_of_a_conversion_names_the_original(tmp_path, card, drafter):
    (tmp_path / "README.md").write_text(f"---\n{card}---\nbase_model: google/gemma-4-31B-it\n")
    (tmp_path / "mine").mkdir()
    assert published.published_drafter(str(tmp_path)) == drafter
    assert published.published_drafter(str(tmp_path / "mine")) is None


def test_auto_is_the_published_drafter(network, add_model):
    folder = add_model("dspark_qwen3_14b_block7")
    network.snapshot_download = lambda name, **_: str(folder.parent / name.rpartition("/")[2])
    for drafter in ("auto", None):
        assert models.resolve_drafter(drafter, "Qwen/Qwen3-14B") == folder
        assert published.drafter_training(drafter, "Qwen/Qwen3-14B").system == DEEPSPEC_SYSTEM


@pytest.mark.parametrize("drafter", [None, "auto", "z-lab/qwen3.5-4B-dflash"])
def test_thinking_follows_the_drafter_training_the_drafter(drafter):
    assert published.drafter_training(drafter, "mlx-community/Qwen3.5-4B-4bit").thinking


@pytest.mark.parametrize("name", ["some/drafter", "/data/drafter"])
def test_an_unknown_drafter_was_trained_as_most_are(name):
    assert published.drafter_training(name, "Qwen/Qwen3-14B") == PublishedDrafter(name=name)
    assert not published.drafter_training(name, None).thinking


def test_what_kind_of_drafter_a_target_has():
    kinds = [source.kind for source in models.draft_sources("google/gemma-4-31B-it")]
    assert kinds == [*["block drafter"] * 4, "assistant", "EAGLE-3 head", "copies of the text"]
    assert models.draft_sources("meta-llama/Llama-3.3-70B-Instruct")[0].kind == "EAGLE-3 head"
    *_, lmsys, _ = models.draft_sources("openai/gpt-oss-120b")
    assert (lmsys.name, lmsys.kind) == ("lmsys/EAGLE3-gpt-oss-120b-bf16", "EAGLE-3 head")
    assert [source.name for source in models.draft_sources(None)] == [BUNDLED_DRAFTER, "suffix"]


def test_every_drafter_of_the_table_is_a_hub_id_and_named_once():
    names = [drafter.name for drafters in PUBLISHED_DRAFTERS.values() for drafter in drafters]
    ids = [name for name in names if name != BUNDLED_DRAFTER]
    assert all(re.fullmatch(r"[\w-]+/[\w.-]+", name) for name in ids)
    for drafters in PUBLISHED_DRAFTERS.values():
        assert len({drafter.name for drafter in drafters}) == len(drafters)
    assert all(target == target.lower() for target in PUBLISHED_DRAFTERS)


@pytest.mark.parametrize("target", [None, published.DEFAULT_TARGET, "/cache/SmolLM2-135M-Instruct"])
def test_bundled_drafter(target):
    folder = models.resolve_drafter(None, target)
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_size"] == 576
    assert 0 < (folder / "model.safetensors").stat().st_size <= 40e6


def test_the_bundled_drafter_has_a_name(tmp_path, monkeypatch):
    assert models.resolve_drafter(BUNDLED_DRAFTER, "my/fine-tune") == models.resolve_drafter(
        None, None
    )
    (tmp_path / BUNDLED_DRAFTER).mkdir()  # a folder of this name comes first
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        models.resolve_drafter(BUNDLED_DRAFTER, None)


def test_how_a_drafter_was_trained_is_known_from_its_snapshot(tmp_path):
    snapshot = tmp_path / "models--z-lab--Qwen3.5-4B-DFlash" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    assert published.drafter_training(str(snapshot), None).thinking


def test_no_drafter_is_known():
    with pytest.raises(CheckpointError, match="no published drafter is known for some/model"):
        models.resolve_drafter(None, "some/model")


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

FORMATS = Path(__file__).parents[1] / "drafters" / "formats"


def listed_format(name: str) -> str:
    matches = (format_ for part, format_ in LISTED.items() if re.search(part, name.lower()))
    found = next(matches, None)
    assert found is not None, f"{name} is listed, but no part of its name tells its format"
    return found


def format_name(folder: ModelFolder) -> str:
    return (find_head_format(folder) or detect_format(folder.config)).name


def test_every_listed_format_is_one_of_the_golden_formats():
    """`test_formats.py` recognises and parses each of them."""
    golden = (json.loads(x.read_text("utf-8")) for x in FORMATS.glob("*/expected.json"))
    assert {*map(listed_format, DRAFTERS)} <= {expected["format"] for expected in golden}


# The model hub, and what its authors change there.
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
