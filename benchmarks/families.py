"""Which model types run draft trees, by backend: a Markdown table made from tiny random models.

    python benchmarks/families.py > docs/families.md

It runs `tests/cuda/families.py` and `tests/mlx/families.py`, which define the outcomes. A dash
stands for a type that a framework does not have, or that the script cannot make a tiny model of
with all of the type's kinds of layers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
FRAMEWORKS = {"cuda": "transformers", "mlx": "mlx-lm"}
OUTCOMES = ("verified", "refused")
INTRODUCTION = """\
Made by `python benchmarks/families.py` in float32 on a CPU, with a tiny random model of each type
that has every kind of layer that the type has.

- *verified*: the logits on a draft tree are those of its paths run as plain text.
- *refused*: loading a drafter for such a target prints an error that says why.
- a dash: the framework lacks the type, or no such tiny model could be made.

Types with latent attention, whose keys and values have different shapes, are refused on `cuda`:
DeepSeek-V2 and -V3, MiniCPM3, and the hybrids Kimi-Linear (`kimi_linear`) and Ling
(`bailing_hybrid`), whose recurrent layers alone could run a draft tree.
"""


def outcomes(backend: str) -> dict[str, str]:
    """The outcome of each model type that could be tried."""
    run = subprocess.run(
        [sys.executable, TESTS / backend / "families.py"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    words = (line.split() for line in run.stdout.partition("\n\n")[0].splitlines())
    return {name: outcome for name, outcome, *_ in words if outcome in OUTCOMES}


def main() -> None:
    """Run both scripts and print the table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    found = {backend: outcomes(backend) for backend in FRAMEWORKS}
    print("# Model families\n")
    print(INTRODUCTION)
    for backend, framework in FRAMEWORKS.items():
        counts = {o: list(found[backend].values()).count(o) for o in OUTCOMES}
        print(
            f"- `{backend}`, {framework} {version(framework)}: "
            f"{counts['verified']} verified, {counts['refused']} refused"
        )
    print("\n| model type | " + " | ".join(found) + " |\n| --- | --- | --- |")
    for name in sorted(set().union(*found.values())):
        print(f"| {name} | " + " | ".join(of.get(name, "-") for of in found.values()) + " |")


if __name__ == "__main__":
    main()
