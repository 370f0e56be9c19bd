"""Which model types run draft trees, by backend: a Markdown table made from tiny random models.

    python -m benchmarks.families

It prints the list and the table at the end of `docs/families.md`.

It runs `tests/cuda/families.py` and `tests/mlx/families.py`, which define the outcomes. A dash
stands for a type that a framework lacks, or of which no tiny model with all of the type's kinds of
layers could be made.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
FRAMEWORKS = {"cuda": "transformers", "mlx": "mlx-lm"}
OUTCOMES = ("verified", "refused")


def run_families(backend: str) -> dict[str, str]:
    """Return the outcome of each model type that could be tried."""
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
    outcomes = {backend: run_families(backend) for backend in FRAMEWORKS}
    for backend, framework in FRAMEWORKS.items():
        verified, refused = (list(outcomes[backend].values()).count(x) for x in OUTCOMES)
        print(
            f"- `{backend}`, {framework} {version(framework)}: "
            f"{verified} verified, {refused} refused"
        )
    print("\n| model type | " + " | ".join(outcomes) + " |\n| --- | --- | --- |")
    for name in sorted(set().union(*outcomes.values())):
        print(f"| {name} | {' | '.join(x.get(name, '-') for x in outcomes.values())} |")


if __name__ == "__main__":
    main()
