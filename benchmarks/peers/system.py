"""A system to compare with: how it is installed, and its process, which decodes prompts."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import mlx_environment
from treeflash.config import AUTO, METHODS, cache_folder
from treeflash.text.tokenizer import Tokenizer

WORKERS = Path(__file__).parent / "workers"
BASELINES = {"cuda": "transformers", "mlx": "mlx-lm", "gguf": "llama.cpp"}
"""By backend, the system of the same framework whose `generate` is the baseline."""
NODE_BUILDS = {("Linux", "x86_64"): "linux-x64", ("Linux", "aarch64"): "linux-arm64"}
"""Builds of llama.cpp for CPUs, by system and machine."""


class PeerError(Exception):
    """The reason why a system or a method cannot run here, in one line."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A system that can be compared.

    Attributes:
        name: as in the results.
        backend: the backend of treeflash with the same framework; `gguf` for one that no backend
            has.
        node: the version of llama.cpp's build for Node.js, whose worker is in JavaScript. Empty for
            a worker in Python, which runs in the current environment.
        batched: its methods that decode several prompts at once.
    """

    name: str
    backend: str
    node: str = ""
    batched: Sequence[str] = ()

    @property
    def worker(self) -> Path:
        """Its script."""
        name = self.name.replace("-", "_").replace(".", "_")
        return WORKERS / f"{name}_worker.{'mjs' if self.node else 'py'}"


SYSTEMS = (
    System(name="transformers", backend="cuda", batched=["generate"]),
    System(name="treeflash", backend="cuda", batched=METHODS),
    System(name="mlx-lm", backend="mlx", batched=["batch_generate"]),
    System(name="treeflash", backend="mlx", batched=METHODS),
    System(name="llama.cpp", backend="gguf", node="3.22.1"),
    System(name="treeflash", backend="reference", batched=METHODS),
)


def setup_of(args: Namespace, target: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what every worker is told about a target without a drafter."""
    return {
        "target": str(target),
        # Treeflash finds the weights by this name, which may keep few bits on a CPU.
        "name": args.target,
        "drafter": None,
        "gguf": None,
        "dtype": args.dtype or AUTO,
        "device": args.device,
        "bits": args.bits,
        "stop_token_ids": sorted(tokenizer.stop_token_ids),
    }


def command(system: System, folder: Path) -> list[str]:
    """Return the command of a system's worker; llama.cpp is installed in a folder of the folder.

    Raises:
        PeerError: it cannot be installed.
    """
    worker = str(system.worker)
    if not system.node:
        return [sys.executable, worker]
    folder = folder / system.name
    run = ["node", worker, str(folder)]
    packages = [f"node-llama-cpp@{system.node}", node_build(system.node)]
    lines, installed = "\n".join(packages), folder / "installed.txt"
    if installed.is_file() and installed.read_text(encoding="utf-8") == lines:
        return run
    print(f"installing {system.name} into {folder}", file=sys.stderr)
    folder.mkdir(exist_ok=True)
    # Builds for other devices, and a script that would compile llama.cpp, are left out.
    options = ["--prefix", str(folder), "--ignore-scripts", "--omit=optional", "--no-audit"]
    npm = ["npm", "install", *options, *packages]
    made = subprocess.run(npm, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        errors = [line for line in made.stderr.splitlines() if "error" in line.lower()[:9]]
        raise PeerError(f"the installation failed: {' '.join(errors[-1:]) or 'no output'}")
    installed.write_text(lines, encoding="utf-8")
    return run


def node_build(version: str) -> str:
    """Return the package with llama.cpp for this machine's processor, for node-llama-cpp.

    Raises:
        PeerError: there is none, or no Node.js.
    """
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise PeerError("needs Node.js, which was not found")
    build = NODE_BUILDS.get((platform.system(), platform.machine()))
    if build is None:
        raise PeerError(f"has no build for {platform.system()} on {platform.machine()}")
    return f"@node-llama-cpp/{build}@{version}"


class Peer:
    """A process that has loaded a system and decodes one prompt after the other.

    Attributes:
        system: the system that it runs.
        threads: threads of its arithmetic.
        description: of what the worker loaded: methods, device, dtype, versions.
    """

    def __init__(self, system: System, setup: Mapping[str, Any], threads: int) -> None:
        """Start the process and load the models.

        Args:
            system: the system to run.
            setup: the pair; see `setup_of`.
            threads: threads of its arithmetic.

        Raises:
            PeerError: the system cannot run here.
        """
        self.system, self.threads = system, threads
        setup = {**setup, "backend": system.backend, "threads": threads}
        if system.backend == "mlx" and (sys.platform == "linux" or setup["device"] == "cpu"):
            setup["dtype"] = "float32"  # MLX is slow in its other types there
        if system.node and not setup["gguf"]:
            raise PeerError("needs the target as a GGUF file: --gguf FILE")
        folder = cache_folder() / "peers"
        folder.mkdir(parents=True, exist_ok=True)
        run = command(system, folder)
        self.log = folder / f"{system.name}-{system.backend}-{threads}.log"
        variables = {
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",  # all models are local folders; avoid look-ups while timing
            **(mlx_environment() if system.backend == "mlx" else {}),
        }
        with self.log.open("w", encoding="utf-8") as stderr:
            self.process = subprocess.Popen(
                run,
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
