"""The checks at load: what passes, each way of failing, and passes that are remembered."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from treeflash import processors
from treeflash.config import LoadConfig
from treeflash.decoding import backend_base
from treeflash.decoding import passed_checks as module
from treeflash.decoding.images import Image, PromptImages
from treeflash.decoding.passed_checks import PassedChecks, passed_checks, run_facts
from treeflash.decoding.probe import ImageSample, check_trees, tree_difference
from treeflash.errors import NumericalError, UnsupportedModelError
from treeflash.reference import numerics
from treeflash.reference.backend import ReferenceBackend, load
from treeflash.reference.verifier import Verifier
from treeflash.testing.models import write_target


@pytest.fixture
def backend(tmp_path):
    write_target(tmp_path, "llama", seed=1)
    return load(tmp_path, None, LoadConfig())


class SiblingLeak(Verifier):
    def forward(self, state, tree):
        causal = np.tri(len(tree), dtype=np.bool_)
        return self.target.forward(
            tree.tokens, tree.positions(state.length), causal, state.kv_cache
        )


class PositionIsColumn(Verifier):
    def forward(self, state, tree):
        positions = state.length + np.arange(len(tree), dtype=np.int32)
        return self.target.forward(tree.tokens, positions, tree.ancestor_mask(), state.kv_cache)


class LeakInLargeTrees(Verifier):
    """As if a kernel for more than 8 rows ignored the mask."""

    def forward(self, state, tree):
        broken = SiblingLeak if len(tree) > 8 else Verifier
        return broken.forward(self, state, tree)


class ColumnsInLargeTrees(Verifier):
    def forward(self, state, tree):
        broken = PositionIsColumn if len(tree) > 8 else Verifier
        return broken.forward(self, state, tree)


class CommitsFirstRows(Verifier):
    """The cache keeps the tree's first rows instead of the accepted ones."""

    def commit_one(self, state, outputs, path):
        super().commit_one(state, outputs, np.arange(len(path), dtype=np.int32))


class CommitsWholeTree(Verifier):
    def commit_one(self, state, outputs, path):
        rows = len(state.kv_cache.pending[0][0][0])
        super().commit_one(state, outputs, np.arange(rows, dtype=np.int32))


class ForgetsLastRow(Verifier):
    def commit_one(self, state, outputs, path):
        whole = path[-1] == len(path) - 1  # a prompt
        super().commit_one(state, outputs, path if whole else path[:-1])


class PositionCountsRejected(Verifier):
    """After a commit, positions count every row that was run, accepted or not."""

    def forward(self, state, tree):
        positions = tree.positions(state.length + getattr(state, "rejected", 0))
        return self.target.forward(tree.tokens, positions, tree.ancestor_mask(), state.kv_cache)

    def commit_one(self, state, outputs, path):
        rejected = len(state.kv_cache.pending[0][0][0]) - len(path)
        state.rejected = getattr(state, "rejected", 0) + rejected
        super().commit_one(state, outputs, path)


class Crash(Verifier):
    def logits(self, trees):
        if any(len(tree) > 1 for _, tree in trees):
            raise IndexError("two rows at once")
        return super().logits(trees)


class NotFinite(Verifier):
    def logits(self, trees):
        raise NumericalError("overflow")


def broken(backend: ReferenceBackend, verifier: type[Verifier]) -> ReferenceBackend:
    backend.verifier = verifier(backend.target)
    return backend


@pytest.mark.parametrize("seed", range(5))
def test_a_target_that_branches_passes(backend, seed):
    check_trees(backend, seed)


@pytest.mark.parametrize(
    ("verifier", "where"),
    {
        SiblingLeak: "on",
        PositionIsColumn: "on",
        LeakInLargeTrees: "on",
        ColumnsInLargeTrees: "on",
        CommitsFirstRows: "after",
        CommitsWholeTree: "after",
        ForgetsLastRow: "after",
        PositionCountsRejected: "after",
    }.items(),
)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 5))]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_target_that_does_not_is_refused(backend, verifier, where, seed, dtype):
    backend.dtype = dtype  # the wider tolerance still tells them apart
    cause = {"on": "tree attention", "after": "committing a path"}[where]
    expected = rf"{cause} changes this model's logits .*relative error .*method ar still works"
    with pytest.raises(UnsupportedModelError, match=expected):
        check_trees(broken(backend, verifier), seed)


@pytest.mark.parametrize("verifier", [LeakInLargeTrees, CommitsFirstRows])
def test_a_small_tree_alone_would_not_notice(backend, verifier):
    assert tree_difference(broken(backend, verifier), np.random.default_rng(0)) < 1e-4


def test_a_target_of_few_positions_passes(tmp_path):
    write_target(tmp_path, "llama", seed=1, max_positions=16)
    check_trees(load(tmp_path, None, LoadConfig()))


class WrongMask(Verifier):
    def forward(self, state, tree):
        mask = tree.ancestor_mask()[:, :-1] if len(tree) > 1 else tree.ancestor_mask()
        return self.target.forward(tree.tokens, tree.positions(state.length), mask, state.kv_cache)


def test_an_error_of_the_backend_is_not_one_of_the_model(backend):
    """It would be reported as an unsupported model, and mended by nobody."""
    with pytest.raises(ValueError, match="broadcast"):
        check_trees(broken(backend, WrongMask))


def test_an_error_of_the_backend_below_a_framework_is_not_one_of_the_model(backend, monkeypatch):
    """NumPy's own Python code raises it, called by the backend."""

    def attention(*args):
        return np.linalg.inv(np.zeros((2, 3)))

    attention = types.FunctionType(attention.__code__, vars(numerics))
    monkeypatch.setattr("treeflash.reference.target.attention", attention)
    with pytest.raises(np.linalg.LinAlgError):
        check_trees(backend)


def test_a_crash_of_the_model_is_a_refusal_that_says_why(backend):
    with pytest.raises(UnsupportedModelError, match=r"two rows at once.*method ar") as caught:
        check_trees(broken(backend, Crash))
    assert isinstance(caught.value.__cause__, IndexError)


def test_other_errors_pass_through(backend):
    with pytest.raises(NumericalError, match="overflow"):
        check_trees(broken(backend, NotFinite))


class Exact(Verifier):
    """Logits that depend on the text up to a node alone, bit for bit."""

    def forward(self, state, tree):
        _, outputs = super().forward(state, tree)
        texts = ([*state.tokens, *tree.tokens[row].tolist()] for row in tree.ancestor_mask())
        logits = [np.random.default_rng(x).normal(size=self.target.vocab_size) for x in texts]
        logits = np.array(logits, np.float32) * np.float32(1 + self.error(state, tree))
        return logits, outputs

    def error(self, state, tree):
        """The relative error of logits."""
        return 0.0


class InexactChunks(Exact):
    """As if all keys were rounded once more for each chunk of a prompt."""

    def run(self, work):
        found = super().run(work)
        for item in work:
            item.state.chunks = getattr(item.state, "chunks", 0) + 1
        return found

    def error(self, state, tree):
        return getattr(state, "chunks", 0) / 512


class InexactBatches(Exact):
    """As if shorter sequences were padded to the longest one, which changes the order of sums."""

    def logits(self, trees):
        found = super().logits(trees)
        longest = max(state.length for state, _ in trees)
        errors = [np.float32(1 + (state.length < longest) / 512) for state, _ in trees]
        return replace(found, logits=list(map(np.multiply, found.logits, errors)))


class InexactTrees(Exact):
    """As if one row had another kernel than several."""

    def error(self, state, tree):
        return (len(tree) > 1) / 512


class InexactPaths(Exact):
    """As if keys were rounded when they move to the place of rejected ones."""

    def commit_one(self, state, outputs, path):
        super().commit_one(state, outputs, path)
        state.moved = getattr(state, "moved", 0) + int(path[-1] >= len(path))

    def error(self, state, tree):
        return getattr(state, "moved", 0) / 512


class InexactPrompts(Exact):
    """As if prompts and sampled tokens had keys that are rounded in different ways."""

    def run(self, work):
        found = super().run(work)
        for item in work:
            item.state.prompt = item.state.length
        return found

    def error(self, state, tree):
        return getattr(state, "prompt", 0) / 2**16


class InexactForks(InexactPrompts):
    """As if a copy of keys lost their last bits."""

    def error(self, state, tree):
        return (not hasattr(state, "prompt")) / 512


@pytest.mark.parametrize("positions", [16, 256])
def test_a_target_whose_logits_depend_on_the_text_alone_is_exact(tmp_path, positions):
    write_target(tmp_path, "llama", seed=1, max_positions=positions)
    backend = broken(load(tmp_path, None, LoadConfig()), Exact)
    backend.check_exact()
    assert backend.inexact is None


@pytest.mark.parametrize(
    ("verifier", "operation"),
    {
        InexactChunks: "a prompt in other chunks",
        InexactBatches: "another sequence in the batch",
        InexactTrees: "a draft tree",
        InexactPaths: "committing a path",
        InexactPrompts: "a prompt in the place of sampled tokens",
        InexactForks: "a fork",
    }.items(),
)
def test_what_changes_a_bit_is_named(backend, verifier, operation):
    expected = f"exact mode is not possible for this target: {operation} changes its logits"
    with pytest.raises(UnsupportedModelError, match=f"^{expected}$"):
        broken(backend, verifier).check_exact()
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
