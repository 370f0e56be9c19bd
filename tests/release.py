"""Installs each file of a release in an empty environment, and runs README's first command there.

    python -m tests.release FOLDER [--extra EXTRA]

FOLDER has what `python -m build` wrote: a wheel and an sdist. The command fails if an installation
does, if the answer with drafts is not the answer of plain decoding, or if anything but the default
target is missing. `PIP_EXTRA_INDEX_URL` may name an index with smaller builds of PyTorch.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
SUFFIXES = (".whl", ".tar.gz")


def first_command() -> list[str]:
    """Return the arguments of the first `treeflash generate` in README."""
    found = re.search(r"treeflash (generate --compare \".*?\")", README.read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit("README has no `treeflash generate --compare`")
    return shlex.split(found[1])


def describe(file: Path) -> str:
    """Return the number of files of a wheel or an sdist, and its size."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            number = len(wheel.namelist())
    else:
        with tarfile.open(file) as sdist:
            number = len(sdist.getnames())
    return f"{file.name}: {number} files, {file.stat().st_size / 1e6:.1f} MB"


def try_file(file: Path, extra: str) -> None:
    """Install a file in an empty environment, and run README's first command in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        venv.create(environment, with_pip=True)
        programs = environment / "bin"
        start = time.monotonic()
        requirement = f"treeflash[{extra}] @ {file.resolve().as_uri()}"
        subprocess.run([programs / "pip", "install", "-q", requirement], check=True)
        print(f"{describe(file)}, installed in {time.monotonic() - start:.0f} s", flush=True)
        command = [programs / "treeflash", *first_command()]
        subprocess.run(command, check=True, cwd=folder)


def main() -> int:
    """Try every file of a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--extra", default="cpu", help="extra to install (default: %(default)s)")
    args = parser.parse_args()
    files = [file for file in sorted(args.folder.iterdir()) if file.name.endswith(SUFFIXES)]
    if len(files) < len(SUFFIXES):
        parser.error(f"{args.folder} has no wheel and sdist; write them with `python -m build`")
    for file in files:
        try_file(file, args.extra)
    return 0


if __name__ == "__main__":
    sys.exit(main())
