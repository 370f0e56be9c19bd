"""The commands `treeflash models` and `treeflash drafters`, and what they find on this machine."""

import json
import os
import re

import numpy as np
import pytest
from mtp_pairs import write_mtp_pair
from rich.filesize import decimal
from safetensors.numpy import save_file

from treeflash.commands import drafters as drafters_command
from treeflash.commands import models as command
from treeflash.hub.cached import cached_models
from treeflash.hub.published import (
    BUNDLED_DRAFTER,
    DEFAULT_TARGET,
    KNOWN_TARGETS,
    PUBLISHED_DRAFTERS,
    published_drafters,
)

STUDIO = "mlx-community/Qwen3-8B-4bit"
DRAFTER = "peerrh/treeflash-qwen3-4b"


@pytest.fixture
def machine(home, network, add_model):
    """A machine with the default target in its cache, and models of the hub and of LM Studio."""
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    add_model("cache/SmolLM2-135M-Instruct", *files)
    add_model(f".lmstudio/models/{STUDIO}")
    for age, (name, commit, *weights) in enumerate(
        [
            (DRAFTER, "b" * 40, "model.safetensors"),
            (DRAFTER, "a" * 40, "model.safetensors"),
            ("some/pickle", "c" * 40, "pytorch_model.bin"),
        ]
    ):
        snapshot = f"hub/models--{name.replace('/', '--')}/snapshots/{commit}"
        for file in add_model(snapshot, "config.json", *weights).iterdir():
            os.utime(file, (age, age))
    return home


@pytest.fixture
def run(capsys):
    """Run the command: exit status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        return command.main(arguments), *capsys.readouterr()

    return run


def test_models_of_all_caches_are_found(machine):
    found = {model.name: model for model in cached_models()}
    assert list(found) == [BUNDLED_DRAFTER, DEFAULT_TARGET, STUDIO, DRAFTER]
    assert [model.nbytes for model in found.values()][1:] == [4000, 2000, 4000]
    assert found[STUDIO].folder == machine / ".lmstudio/models" / STUDIO
    assert found[DRAFTER].folder.name == "a" * 40, "the newest snapshot"


def test_a_machine_without_a_cache_has_the_bundled_drafter():
    (model,) = cached_models()
    assert model.name == BUNDLED_DRAFTER
    assert model.nbytes > 30_000_000


def test_models_on_this_machine_are_listed(machine, run):
    code, out, _ = run()
    assert code == 0
    assert "4.0 kB" in out
    assert out.splitlines()[-1] == f"{decimal(sum(x.nbytes for x in cached_models()))} in all"
    names = [model["name"] for model in json.loads(run("--json")[1])["cached"]]
    assert names[:2] == [BUNDLED_DRAFTER, DEFAULT_TARGET]


@pytest.fixture
def drafters(machine, capsys):
    """Run the command `drafters`: its standard output."""

    def drafters(*arguments: str) -> str:
        assert drafters_command.main(arguments) == 0
        return capsys.readouterr().out

    return drafters


def test_all_targets_and_drafters_are_listed(drafters):
    out = drafters()
    assert len(KNOWN_TARGETS) == len(PUBLISHED_DRAFTERS)
    for target in KNOWN_TARGETS:
        assert "/" in target  # a hub id, which is a name for --target
        assert re.search(rf"^{re.escape(target)}(:|$)", out, re.MULTILINE)
        assert all(f"\n  {drafter.name} " in out for drafter in published_drafters(target))


def test_what_can_draft_for_one_target(drafters):
    lines = drafters("mlx-community/Qwen3-4B-4bit").splitlines()
    assert lines[0] == "mlx-community/Qwen3-4B-4bit"
    words = [DRAFTER, "4.0", "kB", "block", "drafter", "the", "default"]
    assert lines[1].split() == words
    assert "system message 'You are a helpful assistant.'" in lines[2]
    assert lines[-1].split() == ["suffix", "copies", "of", "the", "text", "--method", "suffix"]
    assert len(lines) == 2 + len(PUBLISHED_DRAFTERS["qwen3-4b"])
    assert "4.0 kB in " in drafters(DEFAULT_TARGET)


def test_the_default_target_is_listed_with_the_folder_that_is_loaded(machine, drafters, add_model):
    add_model("cache/default", "SmolLM2-135M-Instruct.Q4_1.gguf")
    folder = machine / "cache/SmolLM2-135M-Instruct"
    assert drafters(DEFAULT_TARGET).splitlines()[0] == f"{DEFAULT_TARGET}: 4.0 kB in {folder}"


def test_models_are_removed_from_the_caches(machine, run):
    code, printed, _ = run("rm", "--yes", DEFAULT_TARGET.lower(), DRAFTER)
    assert code == 0
    assert printed == f"removed {DEFAULT_TARGET.lower()}, 4.0 kB\nremoved {DRAFTER}, 4.0 kB\n"
    assert [model.name for model in cached_models()] == [BUNDLED_DRAFTER, STUDIO]


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("", False), ("no", False)])
def test_a_question_comes_before_a_model_is_deleted(machine, run, typed, answer, removed):
    typed(f"{answer}\n")
    code, printed, _ = run("rm", DRAFTER)
    asked = f"delete {DRAFTER} (4.0 kB)? [y/N] "
    said = (0, f"removed {DRAFTER}, 4.0 kB\n") if removed else (1, "nothing was deleted\n")
    assert (code, printed) == (said[0], asked + said[1])
    assert len(cached_models()) == 4 - removed


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "rm needs the name of a model; `treeflash models` lists them"),
        ([DRAFTER], "rm asks before it deletes, which needs a terminal; add --yes"),
        (["--yes", DRAFTER, "some/other"], "some/other is not in a cache of this machine"),
        ([BUNDLED_DRAFTER], "is not treeflash's to remove"),
        ([STUDIO], "is not treeflash's to remove; use the program"),
    ],
)
def test_what_cannot_be_removed_is_one_line_and_nothing_is_deleted(machine, run, names, message):
    code, printed, error = run("rm", *names)
    assert (code, printed, error.count("\n")) == (2, "", 1)
    assert message in error
    assert len(cached_models()) == 4


@pytest.mark.parametrize(
    ("target", "names", "default"),
    [
        ("some/model", ["suffix"], "suffix"),
        (
            "Qwen/Qwen3.6-27B",
            ["JetBrains/Qwen3.6-27B-DFlash2", "z-lab/Qwen3.6-27B-DFlash", "self", "suffix"],
            None,
        ),
        ("zai-org/GLM-4.6", ["self", "suffix"], "self"),
        (
            "meta-llama/Llama-3.3-70B-Instruct",
            ["RedHatAI/Llama-3.3-70B-Instruct-speculator.eagle3", "suffix"],
            "RedHatAI/Llama-3.3-70B-Instruct-speculator.eagle3",
        ),
    ],
)
def test_sources_are_listed_best_first(drafters, target, names, default):
    (rows,) = json.loads(drafters(target, "--json")).values()
    assert [row["name"] for row in rows] == names
    assert [row["name"] for row in rows if row["option"] == "the default"] == [default or names[0]]


def test_a_folder_tells_whether_it_has_a_head(drafters, add_model, tmp_path):
    without = add_model("without/Qwen3.6-27B")
    save_file({"weight": np.zeros(1, np.float32)}, without / "model.safetensors")
    (without / "config.json").write_text("{}")
    target, _ = write_mtp_pair(tmp_path / "with", "mtp")
    for folder, has_head in ((target, True), (without, False)):
        assert ("\n  self " in drafters(str(folder))) is has_head


def test_json(drafters):
    (rows,) = json.loads(drafters("Qwen/Qwen3.5-4B", "--json")).values()
    assert rows[0] == {
        "name": "z-lab/Qwen3.5-4B-DFlash",
        "bytes": None,
        "kind": "block drafter",
        "option": "the default",
        "thinking": True,
        "system": None,
    }


@pytest.mark.parametrize(
    ("name", "fetched"),
    [
        ("Qwen/Qwen3-14B", ["Qwen/Qwen3-14B", "deepseek-ai/dspark_qwen3_14b_block7"]),
        ("Z-Lab/Qwen3-4B-DFlash-b16", ["Z-Lab/Qwen3-4B-DFlash-b16"]),
        ("some/model", ["some/model"]),
        (DEFAULT_TARGET, [DEFAULT_TARGET, BUNDLED_DRAFTER]),
        (BUNDLED_DRAFTER, [BUNDLED_DRAFTER]),
    ],
)
def test_a_download_has_the_drafter_of_a_target(machine, network, run, add_model, name, fetched):
    folder = add_model("fetched")
    network.snapshot_download = lambda *args, **kwargs: str(folder)
    code, out, _ = run("--download", name)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == fetched


@pytest.mark.parametrize("refusal", [None, "", "a reason"])
def test_a_download_is_what_is_loaded_later(machine, run, monkeypatch, refusal):
    """With the bits of a GGUF file where they are kept."""
    calls = []

    def resolve(name, *, packed):
        calls.append(packed)
        return machine / ".lmstudio"

    monkeypatch.setattr(command, "resolve_target", resolve)
    monkeypatch.setattr(command, "bits_refusal", lambda *_: refusal)
    assert run("--download", "some/model:Q4_K_M")[0] == 0
    assert calls == [refusal is None]


def test_a_download_that_fails_is_one_line(machine, run):
    code, _, error = run("--download", "some/model")
    assert (code, error.count("\n")) == (2, 1)
    assert "check the name and the network" in error


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"model_type": "llama"}, "takes no images: it has no vision tower"),
        ({"model_type": "qwen3_vl", "vision_config": {}}, "takes images, if it passes the check"),
        ({"model_type": "mllama", "vision_config": {}}, "takes no images: its layers attend to"),
        ({"model_type": "other", "vision_config": {}}, "takes no images: images of this model"),
    ],
)
def test_drafters_says_whether_a_target_takes_images(drafters, tmp_path, config, line):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert f"\n  {line}" in drafters(str(tmp_path))
