"""Checks at load that passed are kept for as long as nothing that they depend on has changed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from treeflash import processors
from treeflash.config import LoadConfig
from treeflash.decoding import backend_base
from treeflash.decoding import passed_checks as module
from treeflash.decoding.passed_checks import PassedChecks, passed_checks, run_facts
from treeflash.errors import UnsupportedModelError

VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_CBWR",
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
)


class Machine:
    """A machine on which models may have passed a check; its parts can be replaced."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder, self.patch = folder, monkeypatch
        self.package, self.facts, self.config = "some", ["cpu", "AVX2"], LoadConfig()
        self.models = [folder / name for name in ("target", "drafter")]
        for path in self.models:
            path.mkdir()
            (path / "config.json").write_text("{}")
            (path / "model.safetensors").write_bytes(b"weights")
        self.processor = folder / "cpuinfo"
        self.processor.write_text("model name\t: A\nflags\t: avx2\ncpu MHz\t: 1000\n\nprocessor: 1")
        monkeypatch.setattr(processors, "CPUINFO", self.processor)
        self.sources = folder / "sources"
        self.sources.mkdir()
        (self.sources / "code.py").write_text("1")
        for name in ("some", "other"):
            package = ModuleType(name)
            package.__path__ = [str(self.sources)]
            monkeypatch.setitem(sys.modules, name, package)
        for variable in VARIABLES:
            monkeypatch.delenv(variable, raising=False)

    def checks(self) -> PassedChecks:
        folder = self.folder / "checks"
        return passed_checks(folder, self.models, self.config, self.package, self.facts)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def rewrite(path: Path) -> None:
    """Give a file another content of the same size."""
    content = path.read_bytes()
    path.write_bytes(bytes(255 - byte for byte in content))


CHANGES = {
    "the target's weights": lambda m: rewrite(m.models[0] / "model.safetensors"),
    "the target's configuration": lambda m: rewrite(m.models[0] / "config.json"),
    "the drafter": lambda m: rewrite(m.models[1] / "model.safetensors"),
    "no drafter": lambda m: m.models.pop(),
    "a file more": lambda m: (m.models[0] / "model-2.safetensors").write_bytes(b""),
    "the dtype of the settings": lambda m: setattr(m, "config", LoadConfig(dtype="bfloat16")),
    "a setting": lambda m: setattr(m, "config", LoadConfig(kv_bits=8)),
    "exact mode": lambda m: setattr(m, "config", LoadConfig(exact=True)),
    "the backend": lambda m: setattr(m, "package", "other"),
    "the device and its kernels": lambda m: m.facts.append("AVX512"),
    "the sources": lambda m: (m.sources / "code.py").write_text("2"),
    "a version": lambda m: m.patch.setattr(module, "version", lambda package: "99"),
    "the processor": lambda m: rewrite(m.processor),
    "the system": lambda m: m.patch.setattr(module.platform, "platform", lambda: "other"),
    **{
        variable: lambda m, variable=variable: m.patch.setenv(variable, "7")
        for variable in VARIABLES
    },
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_pass_is_forgotten_when_something_that_it_depends_on_changes(machine, change):
    assert "trees" not in machine.checks()
    machine.checks().add("trees")
    assert "trees" in machine.checks()
    assert "exact" not in machine.checks()
    change(machine)
    assert "trees" not in machine.checks()


def test_a_backend_in_a_lone_module_does_not_depend_on_its_neighbours(tmp_path, monkeypatch):
    """They may be all packages of an environment, or a user's home."""
    for name in ("lone.py", "neighbour.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "spread").mkdir()  # a namespace package, which has no file of its own
    (tmp_path / "spread" / "code.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for package, file in (("lone", "lone.py"), ("spread", "spread/code.py")):
        _, sources = run_facts(LoadConfig(), package)["sources"]
        assert [path for path, *_ in sources] == [str(tmp_path / file)]
        monkeypatch.delitem(sys.modules, package)
    monkeypatch.setitem(sys.modules, "interactive", ModuleType("interactive"))
    assert run_facts(LoadConfig(), "interactive")["sources"][1] == []


@pytest.mark.parametrize("variable", ["LANG", "TREEFLASH_CACHE"])
def test_a_pass_does_not_depend_on_what_changes_no_kernel(machine, variable):
    machine.checks().add("trees")
    machine.patch.setenv(variable, "1")
    machine.processor.write_text(machine.processor.read_text().replace("1000", "3000"))
    machine.config = replace(machine.config, checks=Path("elsewhere"))
    assert "trees" in machine.checks()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"passed": 1}', '{"passed": [["trees"]]}', "\0"])
def test_a_damaged_file_is_ignored_and_replaced(tmp_path, text):
    path = tmp_path / "checks.json"
    path.write_text(text)
    checks = PassedChecks(path)
    assert "trees" not in checks
    checks.add("trees")
    assert json.loads(path.read_text()) == {"passed": {"trees": 1}}


def test_processes_that_pass_checks_at_once_keep_both(tmp_path):
    path = tmp_path / "folder" / "checks.json"
    first, second = PassedChecks(path), PassedChecks(path)
    first.add("trees")
    second.add("exact")
    both = PassedChecks(path)
    assert "trees" in both
    assert "exact" in both
    assert [file.name for file in path.parent.iterdir()] == ["checks.json"]


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    checks = PassedChecks(tmp_path / "file" / "checks.json")
    checks.add("trees")
    assert "trees" in checks
    assert "trees" not in PassedChecks(tmp_path / "file" / "checks.json")


def test_without_a_folder_nothing_is_kept(machine):
    checks = passed_checks(None, machine.models, machine.config, "some", [])
    checks.add("trees")
    assert "trees" not in checks


def test_the_number_that_a_check_found_is_kept(tmp_path):
    path = tmp_path / "checks.json"
    assert PassedChecks(path).find("rows", lambda: 512) == 512
    assert PassedChecks(path).find("rows", lambda: pytest.fail("it was checked before")) == 512

    def fail() -> int:
        raise UnsupportedModelError("it differs")

    with pytest.raises(UnsupportedModelError):
        PassedChecks(path).find("more", fail)
    assert "more" not in PassedChecks(path)
    assert PassedChecks().find("rows", lambda: 64) == 64


class Target:
    """What `BaseBackend` reads of a target."""

    dtype, vocab_size, max_positions = "float32", 8, 8


def test_only_passes_are_kept(tmp_path, monkeypatch):
    found: list[bool] = []

    def check(backend) -> None:
        found.append(len(found) > 0)
        if not found[-1]:
            raise UnsupportedModelError("it differs")

    monkeypatch.setattr(backend_base, "check_trees", check)

    def load() -> backend_base.BaseBackend:
        backend = backend_base.BaseBackend(Target(), None, None)
        backend.passed = PassedChecks(tmp_path / "checks.json")
        return backend

    with pytest.raises(UnsupportedModelError):
        load().check_trees()
    load().check_trees()
    load().check_trees()
    assert found == [False, True], "the third load knows that the check passed"
