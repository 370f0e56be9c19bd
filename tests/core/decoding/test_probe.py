"""The checks at load: what passes, each way of failing, and passes that are remembered."""

import json
import sys
import types
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from failures import failing

from treeflash import processors
from treeflash.config import LoadConfig
from treeflash.decoding import passed_checks as module
from treeflash.decoding.images import Image, PromptImages
from treeflash.decoding.passed_checks import PassedChecks, passed_checks, run_facts
from treeflash.decoding.probe import ImageSample, check_trees
from treeflash.errors import NumericalError, UnsupportedModelError
from treeflash.reference import numerics
from treeflash.reference.backend import ReferenceBackend, load
from treeflash.reference.verifier import Verifier
from treeflash.testing.models import write_target


@pytest.fixture
def backend(tmp_path):
    write_target(tmp_path, "llama", seed=1)
    return load(tmp_path, None, LoadConfig())


class Broken(Verifier):
    """Runs trees with another mask and other positions, and commits other rows.

    `positions` knows how many rows were rejected, and `rows` how many were run.
    """

    def __init__(self, target, mask=None, positions=None, rows=None):
        super().__init__(target)
        self.mask = mask or (lambda tree: tree.ancestor_mask())
        self.positions = positions or (lambda tree, start, rejected: tree.positions(start))
        self.rows = rows or (lambda path, run: path)
        self.rejected = Counter()

    def forward(self, state, tree):
        positions = self.positions(tree, state.length, self.rejected[state])
        return self.target.forward(tree.tokens, positions, self.mask(tree), state.kv_cache)

    def commit_one(self, state, outputs, path):
        run = len(state.kv_cache.pending[0][0][0])
        self.rejected[state] += run - len(path)
        super().commit_one(state, outputs, self.rows(path, run))


def causal(tree):
    return np.tri(len(tree), dtype=np.bool_)


def columns(tree, start, rejected):
    return start + np.arange(len(tree), dtype=np.int32)


ON_TREES = {
    "a node sees all nodes before it": {"mask": causal},
    "a node stands where it is in the list": {"positions": columns},
    "a kernel for more than 8 rows ignores the mask": {
        "mask": lambda tree: causal(tree) if len(tree) > 8 else tree.ancestor_mask()
    },
    "a kernel for more than 8 rows ignores positions": {
        "positions": lambda tree, start, _: (
            columns(tree, start, 0) if len(tree) > 8 else tree.positions(start)
        )
    },
}
AFTER_COMMITS = {
    "the first rows are kept": {"rows": lambda path, run: np.arange(len(path))},
    "the whole tree is kept": {"rows": lambda path, run: np.arange(run)},
    "the last row is forgotten": {
        "rows": lambda path, run: path if len(path) == run else path[:-1]
    },
    "rejected rows count as positions": {
        "positions": lambda tree, start, rejected: tree.positions(start + rejected)
    },
}


def broken(backend: ReferenceBackend, verifier=Broken, **functions) -> ReferenceBackend:
    backend.verifier = verifier(backend.target, **functions)
    return backend


@pytest.mark.parametrize("seed", range(5))
def test_a_target_that_branches_passes(backend, seed):
    check_trees(backend, seed)


# One seed finds every fault; others show that no seed misses one.
@pytest.mark.parametrize("name", [*ON_TREES, *AFTER_COMMITS])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 5))]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_target_that_does_not_is_refused(backend, name, seed, dtype):
    backend.dtype = dtype  # the wider tolerance still tells them apart
    cause = "tree attention" if name in ON_TREES else "committing a path"
    expected = rf"{cause} changes this model's logits .*relative error .*method ar still works"
    with pytest.raises(UnsupportedModelError, match=expected):
        check_trees(broken(backend, **(ON_TREES | AFTER_COMMITS)[name]), seed)


def test_a_target_of_few_positions_passes(tmp_path):
    write_target(tmp_path, "llama", seed=1, max_positions=16)
    check_trees(load(tmp_path, None, LoadConfig()))


def test_an_error_of_the_backend_below_a_framework_is_not_one_of_the_model(backend, monkeypatch):
    """NumPy's own Python code raises it, called by the backend."""

    def attention(*args):
        return np.linalg.inv(np.zeros((2, 3)))

    attention = types.FunctionType(attention.__code__, vars(numerics))
    monkeypatch.setattr("treeflash.reference.target.attention", attention)
    with pytest.raises(np.linalg.LinAlgError):
        check_trees(backend)


def test_a_crash_of_the_model_is_a_refusal_that_says_why(backend):
    def crash(tree):
        raise IndexError("two rows at once")

    with pytest.raises(
        UnsupportedModelError, match=r"method ar still works .two rows at once.$"
    ) as caught:
        check_trees(broken(backend, mask=crash))
    assert isinstance(caught.value.__cause__, IndexError)


def test_other_errors_pass_through(backend):
    with (
        failing(backend.verifier, "logits", NumericalError("overflow")),
        pytest.raises(NumericalError, match="overflow"),
    ):
        check_trees(backend)


class Exact(Verifier):
    """Logits that depend on the text up to a node alone, bit for bit, but for a relative error.

    The error is a function of what a state has seen, counted by name, and of the tree.
    """

    def __init__(self, target, error=lambda seen, tree: 0.0):
        super().__init__(target)
        self.error = error
        self.seen = defaultdict(Counter)

    def run(self, work):
        found = super().run(work)
        for item in work:
            self.seen[item.state] += Counter(chunks=1, prompt=len(item.token_ids))
        return found

    def logits(self, trees):
        longest = max(state.length for state, _ in trees)
        for state, _ in trees:
            self.seen[state]["padded"] = int(state.length < longest)
        return super().logits(trees)

    def forward(self, state, tree):
        _, outputs = super().forward(state, tree)
        texts = ([*state.tokens, *tree.tokens[row].tolist()] for row in tree.ancestor_mask())
        logits = [np.random.default_rng(x).normal(size=self.target.vocab_size) for x in texts]
        factor = np.float32(1 + self.error(self.seen[state], tree))
        return np.array(logits, np.float32) * factor, outputs

    def commit_one(self, state, outputs, path):
        super().commit_one(state, outputs, path)
        self.seen[state]["moved"] += int(path[-1] >= len(path))


INEXACT = {
    "a prompt in other chunks": lambda seen, tree: seen["chunks"] / 512,
    "another sequence in the batch": lambda seen, tree: seen["padded"] / 512,
    "a draft tree": lambda seen, tree: (len(tree) > 1) / 512,
    "committing a path": lambda seen, tree: seen["moved"] / 512,
    "a prompt in the place of sampled tokens": lambda seen, tree: seen["prompt"] / 2**16,
    "a fork": lambda seen, tree: (not seen["prompt"]) / 512,
}
"""By operation, an error of the logits after it, as if something were rounded once more."""


@pytest.mark.parametrize("positions", [16, 256])
def test_a_target_whose_logits_depend_on_the_text_alone_is_exact(tmp_path, positions):
    write_target(tmp_path, "llama", seed=1, max_positions=positions)
    backend = broken(load(tmp_path, None, LoadConfig()), Exact)
    backend.check_exact()
    assert backend.inexact is None


@pytest.mark.parametrize("operation", INEXACT)
def test_what_changes_a_bit_is_named(backend, operation):
    expected = f"exact mode is not possible for this target: {operation} changes its logits"
    with pytest.raises(UnsupportedModelError, match=f"^{expected}$"):
        broken(backend, Exact, error=INEXACT[operation]).check_exact()
    assert backend.inexact is not None


def test_a_target_that_does_not_look_at_images_takes_none(backend):
    ids = [1, *[2] * 4, 3, 4]
    is_feature = np.array(ids) == 2
    samples = []
    for pixel in (0.0, 1.0):
        image = Image(1, 5, {"pixel_values": np.full((1, 4), pixel)})
        samples.append(ImageSample(ids, PromptImages([image], is_feature), None))
    backend.check_images(None, samples)
    assert backend.images == "another picture does not change its logits"


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


def test_only_passes_are_kept(backend, tmp_path):
    """The last load knows that the check passed."""
    sound, wrong = {}, ON_TREES["a node sees all nodes before it"]
    for functions, is_refused in ((wrong, True), (wrong, True), (sound, False), (wrong, False)):
        loaded = broken(ReferenceBackend(backend.target, None), **functions)
        loaded.passed = PassedChecks(tmp_path / "checks.json")
        with pytest.raises(UnsupportedModelError) if is_refused else nullcontext():
            loaded.check_trees()
