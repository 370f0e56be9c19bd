"""The default pair in PyTorch and in MLX: the same trees, accepted paths and tokens.

Tokens and accepted paths are identical, iteration by iteration. So are the trees, but that nodes
whose probabilities differ by less than the frameworks' rounding may change places.
"""

import pytest

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding.backend_base import BaseBackend
from treeflash.hub.models import resolve_drafter
from treeflash.testing import require
from treeflash.testing.comparisons import paths, steps_of
from treeflash.text.tokenizer import Tokenizer

require("torch")
require("mlx_lm")

from treeflash_cuda.backend import load as load_cuda
from treeflash_mlx.backend import load as load_mlx

PROMPTS = (
    "A baker sells 24 rolls an hour. How many does she sell in 7 hours?",
    "Write a Python function that reverses a string.",
    "Explain photosynthesis in two sentences.",
    "Write a Python class for a stack.",
    "A shirt costs 40 dollars and is 25% off. What does it cost now?",
    "What is the sum of the first ten odd numbers?",
    "Write a regular expression for an email address.",
    "Write a haiku about the sea.",
    "Anna reads 30 pages a day. How long does she need for a book of 420 pages?",
    "Write a short letter of thanks to a neighbour.",
    "Solve x^2 - 5x + 6 = 0.",
    "Tell me about the history of the bicycle.",
)
TOLERANCE = 5e-4  # nats of a path; rounding was seen to cost some 1e-5 a node


@pytest.fixture(scope="module")
def pair(smollm2):
    """Both backends with the default pair, and its tokenizer."""
    drafter = resolve_drafter(None, None)
    with pytest.MonkeyPatch.context() as patch:
        # The check at load takes longer than the tests, which compare trees themselves.
        patch.setattr(BaseBackend, "check_trees", lambda _: None)
        return (
            load_cuda(smollm2, drafter, LoadConfig(device="cpu", dtype="float32")),
            load_mlx(smollm2, drafter, LoadConfig(dtype="float32")),
            Tokenizer.from_folder(smollm2),
        )


def assert_trees_equal_but_for_ties(actual, expected, tolerance):
    """The same nodes, except for nodes whose probabilities are equal within a tolerance.

    The float32 log probabilities of real models differ by some 1e-5 between frameworks. A node that
    is in one tree only must be as probable, within the tolerance, as the other tree's last node.
    """
    a, b = (dict(zip(paths(t), t.log_probs, strict=True)) for t in (actual, expected))
    for path in a.keys() & b.keys():
        assert abs(a[path] - b[path]) <= tolerance, path
    for tree, other in ((a, b), (b, a)):
        for path in tree.keys() - other.keys():
            assert tree[path] - min(other.values()) <= tolerance, path


def assert_identical(pair, prompt, config):
    cuda, mlx, tokenizer = pair
    prompt_ids = tokenizer.chat([{"role": "user", "content": prompt}])
    steps = steps_of(cuda, prompt_ids, config)
    others = steps_of(mlx, prompt_ids, config)
    assert [step.tokens for step in others] == [step.tokens for step in steps]
    for other, step in zip(others[1:], steps[1:], strict=True):
        assert_trees_equal_but_for_ties(other.tree, step.tree, TOLERANCE)
        assert paths(other.tree)[other.path[-1]] == paths(step.tree)[step.path[-1]]
    assert max(len(step.tokens) for step in steps) > 1


# A minute for each prompt. Tiny pairs of both backends equal the reference every time.
@pytest.mark.nightly
@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_are_identical(pair, prompt):
    assert_identical(pair, prompt, DecodeConfig(budget=16, max_tokens=64))
