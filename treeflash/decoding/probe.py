"""Checks at load: that a target can run draft trees, and that exact mode is exact.

They make every model family safe, on every machine.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.images import PromptImages
from treeflash.decoding.interfaces import Backend
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import (
    TreeflashError,
    UnsupportedModelError,
    first_line,
    is_device_lost,
    is_of_earlier_work,
    is_out_of_memory,
)

PARENTS = np.array([-1, 0, 1, 2, 0, 4, 1], np.int32)
"""A tree whose columns and depths have different orders, so that positions or masks that are taken
from columns give other logits."""
PATH = np.array([0, 4, 5], np.int32)
"""A path of that tree that skips columns."""
COMMITS = (
    (PARENTS, PATH),
    (np.array([-1, 0, 1, 2], np.int32), np.array([0, 1], np.int32)),
    (np.array([-1], np.int32), np.array([0], np.int32)),
)
"""Trees, and the path to commit of each: part of a tree, part of a chain, a root."""
LARGE_PARENTS = ((np.arange(40) - 1) // 2).astype(np.int32)
"""A binary tree as large as draft trees are: kernels change with the number of rows."""
LARGE_PREFIX = 16
ATTEMPTS = {"float32": 2, "float16": 8, "bfloat16": 8}
"""How many trees are tried, by dtype."""
TOLERANCES = {"float32": 2e-3, "float16": 0.02, "bfloat16": 0.05}
"""Differences of the same computation by other kernels, by dtype; see `relative_difference`."""
LIMITS = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.3}
"""Limits by dtype of the difference on and after a tree, relative to another context's.

Rounding reaches 1e-5 in float32 and 0.2 in bfloat16 (SmolLM2), a wrong row or position 0.5 or more.
"""
TOLERANCE_FACTOR = 5
"""Other kernels round differently, and in half precision may route a token to other experts."""
FRAMEWORKS = {"numpy", "torch", "mlx"}
EXACT_PREFIX = 125
"""Length of a random prompt; trees after it cross a multiple of 128 positions."""
EXACT_NODES = 12
EXACT_CHUNK = 1
"""Tokens of the prompt's first chunk."""
INEXACT = "exact mode is not possible for this target"
"""How messages about exact mode begin."""


def check_trees(backend: Backend, seed: int = 0) -> None:
    """Compare two random trees, and the logits after a commit, with plain decoding.

    A small tree is compared on all of its paths; one of 40 nodes on one path, which is then
    committed and continued. A target with recurrent layers commits several paths, with passes in
    between that are not committed. In half precision a mixture of experts may route a near-tie
    either way, so several trees may be tried. A target that cannot branch fails them all. Raises an
    UnsupportedModelError if the logits differ, or the target's own code fails on a tree, and a
    NumericalError if the logits are not finite.
    """
    rng = np.random.default_rng(seed)
    smallest = np.full(2, np.inf)
    with _errors_on(backend, "a draft tree"):
        for _ in range(ATTEMPTS[backend.dtype]):
            on_tree, after_tree, context = commit_differences(backend, rng)
            on_tree = max(on_tree, tree_difference(backend, rng))
            after_tree = max(after_tree, state_difference(backend, rng))
            differences = np.array([on_tree, after_tree])
            # Logits that do not depend on the context cannot show that a tree respects it.
            relative = differences / context if context else np.full(2, np.inf)
            if (relative <= LIMITS[backend.dtype]).all():
                return
            smallest = np.minimum(smallest, relative)
    cause = "committing a path" if smallest[0] <= LIMITS[backend.dtype] else "tree attention"
    raise UnsupportedModelError(
        f"{cause} changes this model's logits (relative error {smallest.max():.2f}), so "
        "speculative output would differ; method ar still works"
    )


def check_exact(backend: Backend) -> None:
    """Check bit for bit that the target's logits depend on the tokens up to their position alone.

    A random tree is compared with single tokens, a sequence with the same one in a batch, a prompt
    with the same one in other chunks, a fork and a committed path with a sequence without them, and
    a committed path with a prompt of the same tokens, which a later request may find in a cache.
    An UnsupportedModelError names the operation that makes logits differ. A target that passes runs
    draft trees, so `check_trees` has nothing to add.
    """
    rng = np.random.default_rng(0)
    length = max(1, min(EXACT_PREFIX, backend.max_positions - 2 * EXACT_NODES))
    parents = [-1, *(int(rng.integers(max(0, i - 5), i)) for i in range(1, EXACT_NODES))]
    prefix, tree = _prefix_and_tree(backend, rng, length, np.array(parents, np.int32))
    if operation := _changing_operation(backend, prefix, tree):
        raise UnsupportedModelError(f"{INEXACT}: {operation} changes its logits")


def _changing_operation(backend: Backend, prefix: list[int], tree: DraftTree) -> str | None:
    """Name the first operation that changes the logits on or after a tree; None if none does."""
    path = np.flatnonzero(tree.ancestor_mask()[int(np.argmax(tree.depths))]).astype(np.int32)
    capacity = len(prefix) + 2 * len(tree)  # a path and a tree after it
    sessions = [SequenceSession(backend, capacity=capacity) for _ in range(4)]
    branched, plain, short, prompt = sessions
    try:
        branched.extend(prefix)
        branched.state.snapshot()  # for a fork of this length
        on_tree = branched.logits(tree)
        plain.extend(prefix[:EXACT_CHUNK])
        if rest := prefix[EXACT_CHUNK:]:
            plain.extend(rest)
        if not np.array_equal(plain.logits(tree), on_tree):
            return "a prompt in other chunks"
        short.extend(prefix[:2])
        on_short = short.logits(tree)
        batch = backend.verifier.logits([(short.state, tree), (branched.state, tree)])
        if not all(map(np.array_equal, batch.logits, (on_short, on_tree))):
            return "another sequence in the batch"
        for node in path:
            root = DraftTree.root_only(int(tree.tokens[node]))
            if not np.array_equal(plain.logits(root)[0], on_tree[node]):
                return "a draft tree"
            plain.commit(np.zeros(1, np.int32))
        branched.verified = batch
        branched.commit(path)
        if not np.array_equal(branched.logits(tree), plain.logits(tree)):
            return "committing a path"
        prompt.extend(prefix + tree.tokens[path].tolist())
        if not np.array_equal(prompt.logits(tree), branched.logits(tree)):
            return "a prompt in the place of sampled tokens"
        forked = branched.fork(len(prefix), capacity)
        sessions.append(forked)
        if not np.array_equal(forked.logits(tree), on_tree):
            return "a fork"
    finally:
        for session in sessions:
            session.close()
    return None


@dataclass(frozen=True, eq=False)
class ImageSample:
    """A prompt with an image, and the (vocab,) logits of the framework's own model after it.

    They are None where the framework has no model to compare with.
    """

    token_ids: Sequence[int]
    images: PromptImages
    logits: NDArray[np.float32] | None


def check_images(backend: Backend, sample: ImageSample, other: ImageSample) -> None:
    """Compare the text after an image with the framework's own model, other chunks and a tree.

    The samples differ in the picture alone, which must make a difference. Raises an
    UnsupportedModelError that says, as a clause, why the target takes no images.
    """
    prefix, last = sample.token_ids[:-1], sample.token_ids[-1]
    _, tree = _prefix_and_tree(backend, np.random.default_rng(0), 0, PARENTS)
    tree = replace(tree, tokens=np.array([last, *tree.tokens[1:]], np.int32))
    path = np.flatnonzero(tree.ancestor_mask()[int(np.argmax(tree.depths))])
    cut = sample.images.chunk_end(0, sample.images.images[0].first + 1)

    def after(images: PromptImages, *ends: int) -> SequenceSession:
        """Run the prompt in chunks that end there."""
        session = SequenceSession(backend, capacity=len(prefix) + 2 * len(tree))
        for end in ends:
            session.extend(sample.token_ids[session.length : end], images=images)
        return session

    with _errors_on(backend, "an image"):
        with after(sample.images, len(prefix)) as session:
            on_tree = session.logits(tree)
        with after(other.images, len(prefix)) as session:
            after_other = session.logits(tree)
        # The last token is a part of the prompt here, and the root of a tree above.
        with after(sample.images, cut, len(prefix) + 1) as session:
            alone = []
            for token in tree.tokens[path[1:]].tolist():
                alone.append(session.logits(DraftTree.root_only(token))[0])
                session.commit(np.zeros(1, np.int32))
    limit = TOLERANCE_FACTOR * TOLERANCES[backend.dtype]
    for what, actual, expected in (
        ("after an image its logits are not the framework's own", on_tree[0], sample.logits),
        (
            "after another image its logits are not the framework's own",
            after_other[0],
            other.logits,
        ),
        ("an image in other chunks changes its logits", alone[0], on_tree[path[1]]),
        ("a draft tree after an image changes its logits", on_tree[path[-1]], alone[-1]),
    ):
        difference = 0.0 if expected is None else relative_difference(actual, expected)
        if not difference <= limit:
            raise UnsupportedModelError(f"{what} (relative error {difference:.2f})")
    if np.array_equal(on_tree, after_other):
        raise UnsupportedModelError("another picture does not change its logits")


def tree_difference(backend: Backend, rng: np.random.Generator, prefix_length: int = 5) -> float:
    """Measure how much a small random tree's leaves differ at most from plain sequences."""
    prefix, tree = _prefix_and_tree(backend, rng, prefix_length, PARENTS)
    with SequenceSession(backend) as sequence:
        sequence.extend(prefix)
        branched = sequence.logits(tree)
    worst = 0.0
    for leaf in sorted(set(range(len(tree))) - set(tree.parents.tolist())):
        path = np.flatnonzero(tree.ancestor_mask()[leaf])
        with SequenceSession(backend) as alone:
            alone.extend(prefix)
            _append(alone, tree.tokens[path[:-1]].tolist())
            plain = alone.logits(DraftTree.root_only(int(tree.tokens[leaf])))
        worst = max(worst, relative_difference(branched[leaf], plain[0]))
    return worst


def commit_differences(backend: Backend, rng: np.random.Generator) -> tuple[float, float, float]:
    """Measure differences between a large tree and plain sequences, also after a commit.

    The large tree is run together with another sequence. Both are prefilled in the same chunks, so
    that a mixture of experts routes near-ties equally. Returns the difference at the tree's last
    leaf, the difference on a tree that follows after that leaf's path was committed, and, for
    comparison, the difference that other tokens in the place of the path make.
    """
    length = max(1, min(LARGE_PREFIX, backend.max_positions - len(LARGE_PARENTS)))
    prefix, tree = _prefix_and_tree(backend, rng, length, LARGE_PARENTS)
    path = np.flatnonzero(tree.ancestor_mask()[-1]).astype(np.int32)
    _, following = _prefix_and_tree(backend, rng, 0, PARENTS)
    with SequenceSession(backend) as branched, SequenceSession(backend) as other:
        branched.extend(prefix)
        other.extend(prefix[:1])
        # Another sequence in the same pass must make no difference.
        sequences = [(other.state, following), (branched.state, tree)]
        branched.verified = backend.verifier.logits(sequences)
        on_tree = branched.verified.logits[1][-1]
        branched.commit(path)
        after_tree = branched.logits(following)
    with SequenceSession(backend) as plain:
        plain.extend(prefix)
        _append(plain, tree.tokens[path[:-1]].tolist())
        alone = plain.logits(DraftTree.root_only(int(tree.tokens[-1])))[0]
        plain.commit(np.zeros(1, np.int32))
        after_text = plain.logits(following)
    others, _ = _prefix_and_tree(backend, rng, len(path), PARENTS)
    with SequenceSession(backend) as other:
        other.extend(prefix + others)
        after_others = other.logits(following)
    return (
        relative_difference(on_tree, alone),
        relative_difference(after_tree, after_text),
        relative_difference(after_others, after_text),
    )


def state_difference(backend: Backend, rng: np.random.Generator, prefix_length: int = 5) -> float:
    """Measure the largest difference that commits make to the logits on later random trees.

    Paths are committed, each after passes that are not committed, and nodes of the next tree are
    compared with the same sequence run a token at a time. That reveals a state that decayed
    wrongly, was taken from the wrong node, or was changed by a pass that was not committed. It is 0
    for a target without recurrent layers.
    """
    prefix, _ = _prefix_and_tree(backend, rng, prefix_length, PARENTS)
    worst, committed = 0.0, list(prefix)
    with SequenceSession(backend) as branched:
        if not branched.state.needs_snapshots:
            return worst
        branched.extend(prefix)
        for parents, path in COMMITS:
            shapes = PARENTS, parents, PARENTS
            ignored, tree, following = (_prefix_and_tree(backend, rng, 0, x)[1] for x in shapes)
            branched.logits(ignored)
            branched.logits(DraftTree.root_only(int(ignored.tokens[1])))
            branched.logits(tree)
            branched.commit(path)
            committed += tree.tokens[path].tolist()
            logits = branched.logits(following)
            with SequenceSession(backend) as alone:
                alone.extend(prefix)
                _append(alone, committed[prefix_length:])
                for node in PATH:
                    plain = alone.logits(DraftTree.root_only(int(following.tokens[node])))
                    worst = max(worst, relative_difference(logits[node], plain[0]))
                    alone.commit(np.zeros(1, np.int32))
    return worst


def _append(sequence: SequenceSession, tokens: list[int]) -> None:
    """Commit at least one token: all at once, or one by one if the target has recurrent layers.

    Some families round or limit the steps of prompts in another way than the steps of decoding.
    """
    if sequence.state.needs_snapshots:
        for token in tokens:
            sequence.logits(DraftTree.root_only(token))
            sequence.commit(np.zeros(1, np.int32))
    else:
        sequence.extend(tokens)


def _prefix_and_tree(
    backend: Backend, rng: np.random.Generator, length: int, parents: NDArray[np.int32]
) -> tuple[list[int], DraftTree]:
    """Create a sequence of random tokens, and a tree of random tokens."""
    prefix = rng.integers(0, backend.vocab_size, length).tolist()
    tokens = rng.integers(0, backend.vocab_size, len(parents)).astype(np.int32)
    return prefix, DraftTree.from_parents(tokens, parents)


def relative_difference(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Measure the root mean square difference, relative to the expected logits' spread."""
    return float(np.sqrt(np.mean((logits - expected) ** 2)) / expected.std())


def _errors_on(backend: Backend, what: str) -> AbstractContextManager[None]:
    """See `errors_of_model`."""
    package = type(backend).__module__.split(".")[0]
    message = f"the {backend.name} backend cannot run this target on {what}; method ar still works"
    return errors_of_model(package, message)


@contextmanager
def errors_of_model(package: str, message: str) -> Iterator[None]:
    """Turn an error of the target's own code into an UnsupportedModelError with a message.

    Errors of treeflash or of the backend, whose package is given, are bugs and stay what they are.
    """
    try:
        yield
    except TreeflashError:
        raise
    except Exception as error:
        of_device = is_out_of_memory(error) or is_device_lost(error) or is_of_earlier_work(error)
        if of_device or not _raised_by_model(error, package):
            raise
        raise UnsupportedModelError(f"{message} ({first_line(error)})") from error


def _raised_by_model(error: Exception, package: str) -> bool:
    """Return whether an error comes from neither treeflash nor the backend's package.

    The innermost frame outside the numerical frameworks decides.
    """
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    packages = [str(frame.f_globals.get("__name__")).split(".")[0] for frame in frames]
    innermost = next(name for name in reversed(packages) if name not in FRAMEWORKS)
    return innermost not in {"treeflash", package}
