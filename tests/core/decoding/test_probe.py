"""The checks at load: targets that pass, and each way of failing them."""

import types
from dataclasses import replace

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.images import Image, PromptImages
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
