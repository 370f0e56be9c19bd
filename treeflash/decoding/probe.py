"""A check at load that a target can run draft trees; it makes every model family safe."""

from __future__ import annotations

import traceback

import numpy as np
from numpy.typing import NDArray

from treeflash.decoding.interfaces import Backend
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import TreeflashError, UnsupportedModelError, is_out_of_memory

# Branches that swap column and depth order: a position or a mask taken from columns shows.
PARENTS = np.array([-1, 0, 1, 2, 0, 4, 1], np.int32)
PATH = np.array([0, 4, 5], np.int32)
"""A path of that tree that skips columns."""
COMMITS = (
    (PARENTS, PATH),
    (np.array([-1, 0, 1, 2], np.int32), np.array([0, 1], np.int32)),
    (np.array([-1], np.int32), np.array([0], np.int32)),
)
"""Trees to commit a path of: part of a tree, part of a chain, a root."""
# A binary tree as large as those that are decoded: kernels change with the number of rows.
LARGE_PARENTS = ((np.arange(40) - 1) // 2).astype(np.int32)
LARGE_PREFIX = 16
ATTEMPTS = 8
TOLERANCES = {"float32": 2e-3, "float16": 0.02, "bfloat16": 0.05}
"""Of the same computation by other kernels, by dtype: root mean square over standard deviation."""
LIMITS = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.3}
"""Of the differences on and after a tree, as shares of the difference that another context makes.

Rounding reaches 1e-5 in float32 and 0.2 in bfloat16 (SmolLM2), a wrong row or position 0.5 or more.
"""
FRAMEWORKS = {"numpy", "torch", "mlx"}


def check_trees(backend: Backend, seed: int = 0) -> None:
    """Compare two random trees, and what follows one of them, with the same tokens as plain text.

    A small tree is compared on all of its paths; one of 40 nodes on one path, which is then
    committed and continued. A target with recurrent layers commits several paths, with passes in
    between that are not committed. In half precision a mixture of experts may route a near-tie
    either way, so several trees may be tried. A target that cannot branch fails them all.

    Args:
        backend: just loaded.
        seed: of the tokens.

    Raises:
        UnsupportedModelError: they differ, or the target's own code fails on a tree.
        NumericalError: the logits are not finite.
    """
    rng = np.random.default_rng(seed)
    least = np.full(2, np.inf)
    try:
        for _ in range(ATTEMPTS):
            on_tree, after_tree, context = commit_differences(backend, rng)
            on_tree = max(on_tree, tree_difference(backend, rng))
            after_tree = max(after_tree, state_difference(backend, rng))
            found = np.array([on_tree, after_tree]) / context
            if (found <= LIMITS[backend.dtype]).all():
                return
            least = np.minimum(least, found)
    except TreeflashError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or not _raised_by_model(error, backend):
            raise
        raise UnsupportedModelError(
            f"the {backend.name} backend cannot run this target on a draft tree ({error}); "
            "--method ar still works"
        ) from error
    where = "after" if least[0] <= LIMITS[backend.dtype] else "on"
    raise UnsupportedModelError(
        f"this target gives other logits {where} a draft tree than on plain text (they differ by "
        f"{least.max():.0%} of what another context changes), so drafting would change its output; "
        "--method ar still works"
    )


def tree_difference(backend: Backend, rng: np.random.Generator, prefix_length: int = 5) -> float:
    """The difference between logits on a small tree of random tokens and on plain text.

    Args:
        backend: only its target is used.
        rng: for the tokens.
        prefix_length: tokens before the tree.

    Returns:
        The worst leaf's root mean square difference, relative to the logits' standard deviation.
    """
    prefix, tree = _prefix_and_tree(backend, rng, prefix_length, PARENTS)
    with TextSession(backend) as text:
        text.extend(prefix)
        branched = text.logits(tree)
    worst = 0.0
    for leaf in sorted(set(range(len(tree))) - set(tree.parents.tolist())):
        path = np.flatnonzero(tree.ancestor_mask()[leaf])
        with TextSession(backend) as alone:
            alone.extend(prefix)
            _append(alone, tree.tokens[path[:-1]].tolist())
            plain = alone.logits(DraftTree.root_only(int(tree.tokens[leaf])))
        worst = max(worst, _difference(branched[leaf], plain[0]))
    return worst


def commit_differences(backend: Backend, rng: np.random.Generator) -> tuple[float, float, float]:
    """The same for a large tree's last leaf, and for a tree after that leaf's path was committed.

    The large tree is run together with another text. Both texts are prefilled in the same chunks,
    which keeps a mixture's near-ties alike. The third number is the difference that other tokens in
    the place of the path make.
    """
    length = max(1, min(LARGE_PREFIX, backend.max_positions - len(LARGE_PARENTS)))
    prefix, tree = _prefix_and_tree(backend, rng, length, LARGE_PARENTS)
    path = np.flatnonzero(tree.ancestor_mask()[-1]).astype(np.int32)
    _, following = _prefix_and_tree(backend, rng, 0, PARENTS)
    with TextSession(backend) as branched, TextSession(backend) as other:
        branched.extend(prefix)
        other.extend(prefix[:1])
        # Another text in the same pass must make no difference.
        texts = [(other.state, following), (branched.state, tree)]
        on_tree = backend.verifier.logits(texts)[1][-1]
        branched.commit(path)
        after_tree = branched.logits(following)
    with TextSession(backend) as plain:
        plain.extend(prefix)
        _append(plain, tree.tokens[path[:-1]].tolist())
        alone = plain.logits(DraftTree.root_only(int(tree.tokens[-1])))[0]
        plain.commit(np.zeros(1, np.int32))
        after_text = plain.logits(following)
    others, _ = _prefix_and_tree(backend, rng, len(path), PARENTS)
    with TextSession(backend) as other:
        other.extend(prefix + others)
        after_others = other.logits(following)
    return (
        _difference(on_tree, alone),
        _difference(after_tree, after_text),
        _difference(after_others, after_text),
    )


def state_difference(backend: Backend, rng: np.random.Generator, prefix_length: int = 5) -> float:
    """The difference that commits make to the logits on later trees of random tokens.

    Paths are committed, with passes before each that are not, and nodes of the next tree compared
    with the same text run a token at a time: a state that was decayed wrongly, taken from the wrong
    node, or changed by a pass that was not committed shows.

    Args:
        backend: only its target is used.
        rng: for the tokens.
        prefix_length: tokens before the first tree.

    Returns:
        As `tree_difference`; 0 for a target without recurrent layers.
    """
    prefix, _ = _prefix_and_tree(backend, rng, prefix_length, PARENTS)
    worst, committed = 0.0, list(prefix)
    with TextSession(backend) as branched:
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
            with TextSession(backend) as alone:
                alone.extend(prefix)
                _append(alone, committed[prefix_length:])
                for node in PATH:
                    plain = alone.logits(DraftTree.root_only(int(following.tokens[node])))
                    worst = max(worst, _difference(logits[node], plain[0]))
                    alone.commit(np.zeros(1, np.int32))
    return worst


def _append(text: TextSession, tokens: list[int]) -> None:
    """Commit tokens: at once, or one by one where recurrent layers have another function for that.

    Some families round or limit the steps of prompts otherwise than those of decoding.
    """
    if text.state.needs_snapshots:
        for token in tokens:
            text.logits(DraftTree.root_only(token))
            text.commit(np.zeros(1, np.int32))
    elif tokens:
        text.extend(tokens)


def _prefix_and_tree(
    backend: Backend, rng: np.random.Generator, length: int, parents: NDArray[np.int32]
) -> tuple[list[int], DraftTree]:
    """A text of random tokens and a tree of more of them."""
    prefix = rng.integers(0, backend.vocab_size, length).tolist()
    tokens = rng.integers(0, backend.vocab_size, len(parents)).astype(np.int32)
    return prefix, DraftTree.from_parents(tokens, parents)


def _difference(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The root mean square difference, relative to the expected logits' standard deviation."""
    return float(np.sqrt(np.mean((logits - expected) ** 2)) / expected.std())


def _raised_by_model(error: Exception, backend: Backend) -> bool:
    """Whether an error comes from a model's own code, and not from treeflash or the backend.

    The innermost frame outside the numerical frameworks decides: errors in the backend's code are
    to be mended, not reported as a property of the model.
    """
    ours = {"treeflash", type(backend).__module__.split(".")[0]}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__")).split(".")[0]
        if package not in FRAMEWORKS:
            return package not in ours
    return False
