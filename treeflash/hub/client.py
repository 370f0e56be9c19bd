"""What the hub has: models in its cache on this machine, and those that are fetched now.

The hub's package takes longer to import than the help of a command to print, so other modules
import this one where they ask the hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined, unused-ignore]
    GatedRepoError,
    HTTPError,
    RepositoryNotFoundError,
)

from treeflash.drafters.loading import MASK_EMBEDDING
from treeflash.errors import CheckpointError, first_line
from treeflash.hub.disk import disk_problem
from treeflash.hub.gguf_names import choose_model

FETCHED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", MASK_EMBEDDING]
"""Weights, configuration and tokenizer; no code, and the one pickle for which a drafter is refused,
which nothing reads."""
FILES_IGNORED = ["original/*", "consolidated*", "onnx/*"]
"""Copies of the weights in formats that no backend reads."""
REACHABLE_S = 5.0
"""Seconds to wait for an answer of the hub about a model, where there is another way."""


def fetch(name: str, repository: str, quantisation: str | None, cache: Path) -> Path:
    """Fetch the folder of a repository, or the first file of its GGUF model in a quantisation.

    Raises a CheckpointError, in which the model has this name, if it cannot be fetched into the
    hub's `cache`, or the repository does not have one such GGUF model.
    """
    try:
        return _fetch_gguf(repository, quantisation) if quantisation else _snapshot(repository)
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated; request access on its page, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a local folder nor a model of the hub; check the name, or run "
            "`hf auth login` if it is private"
        ) from error
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        if problem := disk_problem(error, cache, "HF_HOME"):
            raise CheckpointError(f"cannot fetch {name}: {problem}") from error
        raise CheckpointError(
            f"{name} is neither a local folder nor a reachable hub id ({first_line(error)}); "
            "check the name and the network, or pass a local folder"
        ) from error


def cached_snapshot(name: str) -> Path | None:
    """Return the folder of a model in the hub's cache; None if it is not there."""
    try:
        return _snapshot(name, local_files_only=True)
    except (OSError, ValueError, HTTPError):
        return None


def snapshots(name: str) -> Iterator[Path]:
    """Yield the folder of a model in the hub's cache, then the one fetched now, where possible."""
    for local_files_only in (True, False):
        try:
            if not local_files_only:
                # This fails within seconds, where a download would retry for minutes.
                HfApi().model_info(name, timeout=REACHABLE_S)
            snapshot = _snapshot(name, local_files_only=local_files_only)
        except (OSError, RuntimeError, HTTPError):
            continue
        yield snapshot


def published_bytes(name: str) -> int:
    """Return the bytes of the weights that the hub has of a model; 0 if they are unknown."""
    try:
        info = HfApi().model_info(name, timeout=REACHABLE_S, files_metadata=True)
    except (OSError, ValueError, HTTPError):
        return 0
    return sum(
        file.size or 0
        for file in info.siblings or ()
        if file.rfilename.endswith(".safetensors")
        and not any(fnmatch(file.rfilename, pattern) for pattern in FILES_IGNORED)
    )


def _snapshot(name: str, *, local_files_only: bool = False) -> Path:
    return Path(
        snapshot_download(
            name,
            local_files_only=local_files_only,
            allow_patterns=FETCHED_FILES,
            ignore_patterns=FILES_IGNORED,
        )
    )


def _fetch_gguf(repository: str, quantisation: str) -> Path:
    """Fetch a repository's GGUF model in a quantisation, and return its first file.

    Without the hub it is looked for on this machine. Raises a CheckpointError unless the repository
    has one such model.
    """
    try:
        names = HfApi().list_repo_files(repository)
    except (GatedRepoError, RepositoryNotFoundError):
        raise
    except (OSError, HTTPError):
        known = Path(snapshot_download(repository, local_files_only=True))
        names = [path.relative_to(known).as_posix() for path in known.rglob("*.gguf")]
    files = choose_model(names, quantisation, repository)
    return Path(snapshot_download(repository, allow_patterns=files)) / files[0]
