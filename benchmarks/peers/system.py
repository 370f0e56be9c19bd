"""A system to compare with: its environment, and the process in it that decodes prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import mlx_environment

WORKERS = Path(__file__).parent / "workers"
MLX_ON_LINUX = "mlx[cpu]>=0.30; sys_platform == 'linux'"
BASELINES = {"cuda": "transformers", "mlx": "mlx-lm"}
"""By backend, the system of the same framework whose `generate` is the baseline."""


class PeerError(Exception):
    """The reason why a system or a method cannot run here, in one line."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A system that can be compared.

    Attributes:
        name: as in the results.
        backend: the backend of treeflash with the same framework.
        requirements: packages to install into its own environment; none to run it in the current
            environment.
    """

    name: str
    backend: str
    requirements: tuple[str, ...] = ()

    @property
    def worker(self) -> Path:
        """Its script."""
        return WORKERS / f"{self.name.replace('-', '_')}_worker.py"


SYSTEMS = (
    System(name="transformers", backend="cuda"),
    System(name="dflash", backend="cuda", requirements=("dflash[local]==0.1.0",)),
    System(name="flashspec", backend="cuda", requirements=("flashspec==0.3.1",)),
    System(name="treeflash", backend="cuda"),
    System(name="mlx-lm", backend="mlx"),
    System(name="dflash-mlx", backend="mlx", requirements=("dflash-mlx==0.1.8", MLX_ON_LINUX)),
    System(name="treeflash", backend="mlx"),
)


def interpreter(system: System, environments: Path, install: bool) -> str:
    """Return the Python of a system's environment, which is created if `install` allows it.

    Raises:
        PeerError: the system is not installed, or cannot be.
    """
    if not system.requirements:
        return sys.executable
    folder = environments / system.name
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    requirements, installed = "\n".join(system.requirements), folder / "installed.txt"
    if installed.is_file() and installed.read_text(encoding="utf-8") == requirements:
        return python
    if not install:
        raise PeerError(f"not installed in {folder}; omit --no-install")
    print(f"installing {system.name} into {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    command = [python, "-m", "pip", "install", "--quiet", "--no-input", *system.requirements]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode != 0:
        lines = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
        raise PeerError(f"pip install failed: {' '.join(lines[-1:]) or 'no output'}")
    installed.write_text(requirements, encoding="utf-8")
    return python


class Peer:
    """A process that has loaded a system and decodes one prompt after the other.

    Attributes:
        system: the system that it runs.
        description: of what the worker loaded: methods, device, dtype, versions.
    """

    def __init__(
        self, system: System, python: str, setup: dict[str, Any], threads: int, log: Path
    ) -> None:
        """Start the process and load the models.

        Args:
            system: the system to run.
            python: its interpreter.
            setup: the first request: target, drafter, device, dtype, stop tokens.
            threads: threads of its arithmetic.
            log: the file for its standard error.

        Raises:
            PeerError: loading failed.
        """
        self.system = system
        self.log = log
        variables = {
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",  # all models are local folders; avoid look-ups while timing
            **(mlx_environment() if system.backend == "mlx" else {}),
        }
        with log.open("w", encoding="utf-8") as stderr:
            self.process = subprocess.Popen(
                [python, str(system.worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                env=os.environ | variables,
            )
        try:
            self.description = self.ask(setup)
        except PeerError:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            PeerError: the request failed, or the process ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            last = self.log.read_text(encoding="utf-8", errors="replace").split("\n")[-2:-1]
            raise PeerError(" ".join([f"its process ended with exit code {code}:", *last]))
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    def close(self) -> None:
        """End the process."""
        try:
            self.process.communicate(timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()
