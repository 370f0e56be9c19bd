"""What the names of GGUF files say: the quantisation of a model, and which files are its parts.

The parts of a model are named `NAME-00001-of-00003.gguf` and so on, as llama.cpp splits them. The
name of a model ends with its quantisation, as in `Qwen3-4B-Q4_K_M`. Files with `mmproj` in their
names are vision towers. Files in Ollama's store are named by a hash, without a suffix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from treeflash.errors import CheckpointError

PART = re.compile(r"(?P<model>.+)-\d{5}-of-(?P<parts>\d{5})\.gguf", re.IGNORECASE)


def whole_models(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the models among files by their names, each with the names of all its files."""
    return {
        model_of(name): parts_of(name)
        for name in sorted(names)
        if name.lower().endswith(".gguf") and "mmproj" not in name.lower()
    }


def model_of(name: str) -> str:
    """Return the name of the model of a file: without the number of the part and the suffix."""
    found = PART.fullmatch(name)
    return found["model"] if found else re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE)


def has_gguf_header(path: Path) -> bool:
    """Return whether a file says that it is a GGUF file, whatever its name."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def parts_of(name: str) -> list[str]:
    """Return the names of all files of a file's model, in order."""
    found = PART.fullmatch(name)
    if found is None:
        return [name]
    model, parts = found["model"], found["parts"]
    return [f"{model}-{number:05}-of-{parts}.gguf" for number in range(1, int(parts) + 1)]


def part_files(path: Path) -> list[Path]:
    """Return all files of a file's model, in order; a CheckpointError if one is missing."""
    files = [path.with_name(name) for name in parts_of(path.name)]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, which is a part of the model of {path.name}")
    return files


def choose_model(names: Iterable[str], quantisation: str, repository: str) -> list[str]:
    """Return the files of the model in a quantisation, regardless of case.

    The quantisation may be more of the model's name, up to all of it. Raises a CheckpointError,
    which says what the repository has, unless there is just one.
    """
    models = whole_models(names)
    end = re.compile(rf"(^|[-._/]){re.escape(quantisation)}$", re.IGNORECASE)
    found = [model for model in models if end.search(model)]
    if len(found) == 1:
        return models[found[0]]
    if found:
        names = ", ".join(model.rpartition("/")[2] for model in found)
        raise CheckpointError(
            f"{repository} has several GGUF models in {quantisation}; give a longer name: {names}"
        )
    known = ", ".join(dict.fromkeys(re.split(r"[-./]", model)[-1] for model in models))
    raise CheckpointError(
        f"{repository} has no GGUF model in {quantisation}; it has {known or 'no GGUF files'}"
    )
