"""The default pair in PyTorch and in MLX: the same trees, accepted paths and tokens.

Tokens and accepted paths are identical, iteration by iteration. So are the trees, but that nodes
whose probabilities differ by less than the frameworks' rounding may change places.
"""

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding.backend_base import BaseBackend
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
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
    "What is the capital of Portugal?",
    "Tom has 15 marbles and gives a third of them away. How many are left?",
    "Write a function that checks whether a number is prime.",
    "Explain photosynthesis in two sentences.",
    "A train covers 180 km in 2.5 hours. What is its average speed?",
    "Write a Python function that merges two sorted lists.",
    "Who wrote Don Quixote?",
    "If x + 7 = 19, what is 3x?",
    "Write a Python class for a stack.",
    "Give me three tips for sleeping better.",
    "A shirt costs 40 dollars and is 25% off. What does it cost now?",
    "Write a function that counts the vowels in a text.",
    "Describe a thunderstorm to someone who has never seen one.",
    "What is the sum of the first ten odd numbers?",
    "Write a Python function that flattens a nested list.",
    "Name five animals that live in the desert.",
    "How many minutes are there in three days?",
    "Write a regular expression for an email address.",
    "Write a haiku about the sea.",
    "A rectangle is 8 cm by 5 cm. What are its area and perimeter?",
    "Write a Python function that computes a factorial recursively.",
    "Why is the sky blue?",
    "Anna reads 30 pages a day. How long does she need for a book of 420 pages?",
    "Write a function that finds the largest number in a list.",
    "Write a short letter of thanks to a neighbour.",
    "What is 17 times 23?",
    "Write a Python generator of the Fibonacci numbers.",
    "What causes the seasons?",
    "Three friends share 51 euros equally. How much does each get?",
    "Write a function that removes duplicates from a list and keeps the order.",
    "Suggest a name for a bakery and say why.",
    "Solve x^2 - 5x + 6 = 0.",
    "Write a Python function that counts words in a file.",
    "Explain what an API is to a child.",
    "A tank holds 600 litres and loses 4 litres a minute. When is it empty?",
    "Write a function that checks whether two words are anagrams.",
    "Tell me about the history of the bicycle.",
    "Convert 68 degrees Fahrenheit to Celsius.",
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


# Their tokens are compared in every run.
@pytest.mark.nightly
def test_logits_of_the_same_folder_are_close(pair):
    cuda, mlx, tokenizer = pair
    prompt_ids = tokenizer.chat([{"role": "user", "content": PROMPTS[0]}])
    logits = []
    for backend in (cuda, mlx):
        text = SequenceSession(backend)
        text.extend(prompt_ids[:-1])
        logits.append(text.logits(DraftTree.root_only(prompt_ids[-1])))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-3)


# Likewise for tiny pairs in `test_cross.py`, and for the target in `test_published_trees.py`.
@pytest.mark.nightly
@pytest.mark.parametrize("prompt", PROMPTS[:1])
def test_a_few_tokens_are_identical(pair, prompt):
    assert_identical(pair, prompt, DecodeConfig(budget=8, max_tokens=12))


@pytest.mark.nightly
@pytest.mark.parametrize("prompt", PROMPTS)
def test_many_tokens_are_identical(pair, prompt):
    assert_identical(pair, prompt, DecodeConfig(budget=16, max_tokens=64))
