"""The models that are on this machine already, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from treeflash.hub.models import (
    BUNDLED_DRAFTER,
    DEFAULT_TARGET,
    cache_folder,
    local_folders,
    model_name,
    resolve_drafter,
)


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """A model on this machine: its hub id or bundled name, its folder, and its size in bytes."""

    name: str
    folder: Path
    nbytes: int


def cached_models() -> list[CachedModel]:
    """The bundled drafter, the default target if it was fetched, and LM Studio's and the hub's.

    Models without weights in safetensors files are left out.
    """
    folders = {
        BUNDLED_DRAFTER: resolve_drafter(None, None),
        DEFAULT_TARGET: cache_folder() / DEFAULT_TARGET.rpartition("/")[2],
    }
    found = [
        CachedModel(name=name, folder=folder, nbytes=folder_nbytes(folder))
        for name, folder in folders.items()
        if (folder / "config.json").is_file()
    ]
    lm_studio = [folder for folder in local_folders() if model_name(folder) == folder.name]
    found += [
        CachedModel(
            name=f"{folder.parent.name}/{folder.name}", folder=folder, nbytes=folder_nbytes(folder)
        )
        for folder in lm_studio
    ]
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return found
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        revisions = sorted(repository.revisions, key=lambda revision: revision.last_modified)
        if revisions and any((folder := revisions[-1].snapshot_path).glob("*.safetensors")):
            name, nbytes = repository.repo_id, repository.size_on_disk
            found.append(CachedModel(name=name, folder=folder, nbytes=nbytes))
    return found


def folder_nbytes(folder: Path) -> int:
    """The size of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
