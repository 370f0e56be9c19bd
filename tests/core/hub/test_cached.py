"""The commands `treeflash models` and `treeflash drafters`, and what they find on this machine."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from failures import failing
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from rich.filesize import decimal
from safetensors.numpy import save_file

from treeflash.commands import drafters as drafters_command
from treeflash.commands import models as command
from treeflash.errors import CheckpointError
from treeflash.hub import cached, client, models
from treeflash.hub.cached import cached_models
from treeflash.hub.published import (
    BUNDLED_DRAFTER,
    DEFAULT_TARGET,
    KNOWN_TARGETS,
    PUBLISHED_DRAFTERS,
    published_drafters,
)


def make_snapshot(folder, *files):
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_bytes(b"0" * 1000)
    return folder


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with the default target, a drafter and two other repositories in its caches."""
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path / "cache"))
    default = tmp_path / "cache" / "SmolLM2-135M-Instruct"
    make_snapshot(
        default, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    )

    def repository(name, *files):
        folder = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots"
        old = SimpleNamespace(last_modified=1, snapshot_path=make_snapshot(folder / "old"))
        snapshot = make_snapshot(folder / "new", *files)
        new = SimpleNamespace(last_modified=2, snapshot_path=snapshot)
        return SimpleNamespace(repo_id=name, revisions=[new, old], size_on_disk=7_000_000)

    repositories = [
        repository("peerrh/treeflash-qwen3-4b", "config.json", "model.safetensors"),
        repository("some/pickle", "config.json", "pytorch_model.bin"),
    ]
    monkeypatch.setattr(cached, "scan_cache_dir", lambda: SimpleNamespace(repos=repositories))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(models, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run the command: exit status and standard output."""

    def run(*arguments: str) -> tuple[int, str]:
        code = command.main(arguments)
        return code, capsys.readouterr().out

    return run


def test_models_of_lm_studio_are_listed(machine):
    folder = machine / ".lmstudio/models/mlx-community/Qwen3-8B-4bit"
    make_snapshot(folder, "config.json", "model.safetensors")
    found = {model.name: model for model in cached_models()}
    assert found["mlx-community/Qwen3-8B-4bit"].folder == folder
    assert found["mlx-community/Qwen3-8B-4bit"].nbytes == 2000


def test_models_of_all_caches_are_found(machine):
    found = {model.name: model for model in cached_models()}
    assert list(found) == [BUNDLED_DRAFTER, DEFAULT_TARGET, "peerrh/treeflash-qwen3-4b"]
    assert found[DEFAULT_TARGET].nbytes == 4000
    assert found["peerrh/treeflash-qwen3-4b"].folder.name == "new"


def test_a_machine_without_a_cache_has_the_bundled_drafter(tmp_path, monkeypatch):
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path))
    with failing(cached, "scan_cache_dir", CacheNotFound("no cache", tmp_path)):
        (model,) = cached_models()
    assert model.name == BUNDLED_DRAFTER
    assert model.nbytes > 30_000_000


def test_models_on_this_machine_are_listed(machine, run):
    code, out = run()
    assert code == 0
    assert "7.0 MB" in out
    assert out.splitlines()[-1] == f"{decimal(sum(x.nbytes for x in cached_models()))} in all"
    names = [model["name"] for model in json.loads(run("--json")[1])["cached"]]
    assert names[:2] == [BUNDLED_DRAFTER, DEFAULT_TARGET]


@pytest.fixture
def drafters(capsys, monkeypatch):
    """Run the command `drafters` without the hub: its standard output."""
    monkeypatch.setattr(client, "_snapshot", lambda name, **_: Path("nowhere"))

    def drafters(*arguments: str) -> str:
        assert drafters_command.main(arguments) == 0
        return capsys.readouterr().out

    return drafters


def test_all_targets_and_drafters_are_listed(machine, drafters):
    out = drafters()
    assert len(KNOWN_TARGETS) == len(PUBLISHED_DRAFTERS)
    for target in KNOWN_TARGETS:
        assert "/" in target  # a hub id, which is a name for --target
        assert re.search(rf"^{re.escape(target)}(:|$)", out, re.MULTILINE)
        assert all(f"\n  {drafter.name} " in out for drafter in published_drafters(target))


def test_what_can_draft_for_one_target(machine, drafters):
    lines = drafters("mlx-community/Qwen3-4B-4bit").splitlines()
    assert lines[0] == "mlx-community/Qwen3-4B-4bit"
    words = ["peerrh/treeflash-qwen3-4b", "7.0", "MB", "block", "drafter", "the", "default"]
    assert lines[1].split() == words
    assert "system message 'You are a helpful assistant.'" in lines[2]
    assert lines[-1].split() == ["suffix", "copies", "of", "the", "text", "--method", "suffix"]
    assert len(lines) == 2 + len(PUBLISHED_DRAFTERS["qwen3-4b"])
    assert "4.0 kB in " in drafters(DEFAULT_TARGET)


@pytest.fixture
def hub(machine, monkeypatch):
    """A model in two revisions in a cache of the hub."""
    folder = machine / "hub" / "models--some--model"
    for number, commit in enumerate(("a" * 40, "b" * 40)):
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        blob = folder / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(b"0" * 1000)
        (snapshot / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr(cached, "scan_cache_dir", lambda: scan_cache_dir(machine / "hub"))
    return folder


def test_models_are_removed_from_the_caches(machine, hub, run):
    assert run("rm", "--yes", DEFAULT_TARGET.lower(), "some/model") == (
        0,
        f"removed {DEFAULT_TARGET.lower()}, 4.0 kB\nremoved some/model, 2.0 kB\n",
    )
    assert not hub.exists()
    assert not (machine / "cache" / "SmolLM2-135M-Instruct").exists()
    assert [model.name for model in cached_models()] == [BUNDLED_DRAFTER]


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("", False), ("no", False)])
def test_a_question_comes_before_a_model_is_deleted(
    machine, hub, run, monkeypatch, answer, removed
):
    asked = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answer)
    code, printed = run("rm", "some/model")
    assert asked == ["delete some/model (2.0 kB)? [y/N] "]
    if removed:
        assert (code, printed) == (0, "removed some/model, 2.0 kB\n")
    else:
        assert (code, printed) == (1, "nothing was deleted\n")
    assert hub.exists() != removed


def test_nothing_is_deleted_without_a_terminal_to_ask(machine, hub, capsys):
    assert command.main(["rm", "some/model"]) == 2
    assert "rm asks before it deletes, which needs a terminal; add --yes" in capsys.readouterr().err
    assert hub.exists()


def test_nothing_is_deleted_if_a_name_is_unknown(machine, hub, capsys):
    assert command.main(["rm", "--yes", "some/model", "some/other"]) == 2
    assert hub.exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "rm needs the name of a model; `treeflash models` lists them"),
        (["some/other"], "some/other is not in a cache of this machine"),
        ([BUNDLED_DRAFTER], "is not treeflash's to remove"),
        (["mlx-community/Qwen3-8B-4bit"], "is not treeflash's to remove; use the program"),
    ],
)
def test_what_cannot_be_removed_is_one_line(machine, hub, capsys, names, message):
    make_snapshot(
        machine / ".lmstudio/models/mlx-community/Qwen3-8B-4bit", "config.json", "model.safetensors"
    )
    assert command.main(["rm", *names]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert len(cached_models()) == 4


def test_an_empty_name_is_refused(capsys):
    assert drafters_command.main([""]) == 2
    assert "the name of the target is empty" in capsys.readouterr().err


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
def test_sources_are_listed_best_first(machine, drafters, target, names, default):
    (rows,) = json.loads(drafters(target, "--json")).values()
    assert [row["name"] for row in rows] == names
    assert [row["name"] for row in rows if row["option"] == "the default"] == [default or names[0]]


def test_a_folder_tells_whether_it_has_a_head(machine, drafters, monkeypatch, tmp_path):
    make_snapshot(tmp_path / "Qwen3.6-27B", "config.json")
    for has_head in (True, False):
        monkeypatch.setattr(models, "_has_own_head", lambda _, has=has_head: has)
        assert ("--drafter self" in drafters(str(tmp_path / "Qwen3.6-27B"))) is has_head


def test_json(machine, drafters):
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
def test_a_download_has_the_drafter_of_a_target(machine, run, monkeypatch, name, fetched):
    for step in ("_resolve", "_default_target"):
        monkeypatch.setattr(models, step, lambda *_, **__: machine / "some")
    make_snapshot(machine / "some", "config.json", "model.safetensors")
    code, out = run("--download", name)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == fetched


@pytest.mark.parametrize("refusal", [None, "", "a reason"])
def test_a_download_is_what_is_loaded_later(machine, run, monkeypatch, refusal):
    """With the bits of a GGUF file where they are kept."""
    calls = []

    def resolve(name, *, packed):
        calls.append(packed)
        return machine / "some"

    monkeypatch.setattr(command, "resolve_target", resolve)
    monkeypatch.setattr(command, "bits_refusal", lambda *_: refusal)
    make_snapshot(machine / "some", "config.json", "model.safetensors")
    assert run("--download", "some/model:Q4_K_M")[0] == 0
    assert calls == [refusal is None]


def test_a_download_that_fails_is_one_line(machine, capsys):
    with failing(models, "_resolve", CheckpointError("not reachable")):
        assert command.main(["--download", "some/model"]) == 2
    assert capsys.readouterr().err == "error: not reachable\n"


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
