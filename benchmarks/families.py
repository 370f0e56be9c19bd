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
from collections.abc import Sequence
from importlib.metadata import version

from benchmarks.common import ROOT, Parser, require_testing
from treeflash.cli.console import guarded
from treeflash.errors import ConfigError
from treeflash.registry import loader

FRAMEWORKS = {"cuda": "transformers", "mlx": "mlx-lm"}
OUTCOMES = ("verified", "refused")


def run_families(backend: str) -> dict[str, str]:
    """Return the outcome of each model type that could be tried."""
    script = "tests.helpers.families"
    run = subprocess.run(
        [sys.executable, "-m", script, backend],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    if run.returncode:
        raise ConfigError(f"{script} failed with exit status {run.returncode}")
    words = (line.split() for line in run.stdout.partition("\n\n")[0].splitlines())
    return {name: outcome for name, outcome, *_ in words if outcome in OUTCOMES}


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run both scripts and print the table."""
    Parser(__doc__, json=False).parse_args(argv)
    for backend in FRAMEWORKS:
        loader(backend)  # its error is clearer than a script's
        require_testing(backend)
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
