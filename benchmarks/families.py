"""Which model types run draft trees, by backend: a Markdown table made from tiny random models.

    python -m benchmarks.families

It prints the list and the table at the end of `docs/families.md`.

It runs `tests.helpers.families`, which defines the outcomes. A dash stands for a type that a
framework lacks, or of which no tiny model with all of the type's kinds of layers could be made.
"""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from functools import partial
from importlib.metadata import version

from benchmarks.common import ROOT, Parser, command, require_testing
from treeflash.registry import loader

FRAMEWORKS = {"cuda": "transformers", "mlx": "mlx-lm"}
OUTCOMES = ("verified", "refused")


def outcomes_of(backend: str) -> dict[str, str]:
    """Return the outcome of each model type that could be tried."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.families", backend],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    words = (line.split() for line in run.stdout.partition("\n\n")[0].splitlines())
    return {name: outcome for name, outcome, *_ in words if outcome in OUTCOMES}


@command(partial(Parser, __doc__, json=False))
def main(_: Namespace) -> int:
    """Try the types of each backend in a process of its own, and print the list and the table."""
    for backend in FRAMEWORKS:
        loader(backend)  # its error is clearer than a script's
        require_testing(backend)
    found = {backend: outcomes_of(backend) for backend in FRAMEWORKS}
    for backend, framework in FRAMEWORKS.items():
        counts = Counter(found[backend].values())
        shown = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
        print(f"- `{backend}`, {framework} {version(framework)}: {shown}")
    print("\n| model type | " + " | ".join(found) + " |\n| --- | --- | --- |")
    for name in sorted(set().union(*found.values())):
        print(f"| {name} | {' | '.join(x.get(name, '-') for x in found.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
