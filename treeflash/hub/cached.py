"""The models on this machine: what the caches have, and removing it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import CachedRepoInfo, HFCacheInfo, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from treeflash.config import cache_folder
from treeflash.errors import CheckpointError
from treeflash.hub.models import (
    CONVERTED,
    DEFAULT_TARGET_FILES,
    PACKED,
    has_weights,
    resolve_drafter,
    studio_models,
)
from treeflash.hub.published import BUNDLED_DRAFTER, DEFAULT_TARGET


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """A model on this machine: its hub id or bundled name, its folder, and its size in bytes.

    `remove` deletes it; None if it belongs to a package or to another program.
    """

    name: str
    folder: Path
    nbytes: int
    remove: Callable[[], None] | None = None

    @classmethod
    def from_folder(
        cls, name: str, folder: Path, remove: Callable[[], None] | None = None
    ) -> CachedModel:
        """Describe the model of a folder; its size is the size of the files there."""
        files = (path for path in folder.rglob("*") if path.is_file())
        nbytes = sum(path.stat().st_size for path in files)
        return cls(name=name, folder=folder, nbytes=nbytes, remove=remove)


def cached_models() -> list[CachedModel]:
    """List the bundled drafter, a fetched default target, and LM Studio's and the hub's models.

    Models without weights in safetensors files are left out.
    """
    found = [CachedModel.from_folder(BUNDLED_DRAFTER, resolve_drafter(None, None))]
    own, name = cache_folder(), DEFAULT_TARGET.rpartition("/")[2]
    packed = sorted((own / PACKED).glob(f"**/{name}"))  # of older versions too
    for default in (own / name, *packed, own / DEFAULT_TARGET_FILES):
        if default.is_dir():
            remove = partial(shutil.rmtree, default)
            found.append(CachedModel.from_folder(DEFAULT_TARGET, default, remove))
    for folder in sorted(filter(has_weights, (cache_folder() / CONVERTED).glob("*/*"))):
        remove = partial(shutil.rmtree, folder.parent)
        found.append(CachedModel.from_folder(folder.name, folder, remove))
    found += [CachedModel.from_folder(name, folder) for name, folder in studio_models().items()]
    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return found
    for repository in sorted(cache.repos, key=lambda repository: repository.repo_id):
        revisions = sorted(repository.revisions, key=lambda revision: revision.last_modified)
        if revisions and any((folder := revisions[-1].snapshot_path).glob("*.safetensors")):
            name, nbytes = repository.repo_id, repository.size_on_disk
            remove = partial(_remove_repository, cache, repository)
            found.append(CachedModel(name=name, folder=folder, nbytes=nbytes, remove=remove))
    return found


def _remove_repository(cache: HFCacheInfo, repository: CachedRepoInfo) -> None:
    hashes = [revision.commit_hash for revision in repository.revisions]
    cache.delete_revisions(*hashes).execute()


def removable(name: str) -> list[CachedModel]:
    """Find the models of a name that `remove` deletes, from the caches of treeflash and of the hub.

    A CheckpointError is raised if there is none, or it belongs to a package or another program.
    """
    found = [model for model in cached_models() if model.name.lower() == name.lower()]
    if not found:
        raise CheckpointError(
            f"{name} is not in a cache of this machine; `treeflash models` lists what is"
        )
    own = [model for model in found if model.remove is not None]
    if not own:
        raise CheckpointError(
            f"{name} in {found[0].folder} is not treeflash's to remove; use the program that "
            "installed it"
        )
    return own
