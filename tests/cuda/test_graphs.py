"""Static forward passes: shared by texts one after the other, and functions of tensors alone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import decode
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.testing import require
from treeflash.testing.models import write_drafter, write_target

require("torch")

import torch  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from treeflash_cuda import graphs  # noqa: E402
from treeflash_cuda.arena import StaticArena  # noqa: E402
from treeflash_cuda.backend import load  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    write_target(folder / "target", "qwen3", seed=1)
    write_drafter(folder / "drafter", folder / "target", seed=2)
    return folder / "target", folder / "drafter"


@pytest.fixture
def backend(folders):
    return load(*folders, LoadConfig(device="cpu", cuda_graphs=True))


def chain(*tokens):
    return DraftTree.chain(np.array(tokens, np.int32), np.zeros(len(tokens)))


def started(backend, prompt, capacity=512):
    text = TextSession(backend, capacity=capacity)
    text.extend(prompt)
    return text


def region_of(text):
    return text.state.key_values.region


def test_trees_are_filled_up_to_powers_of_two(backend):
    text = started(backend, [3, 4, 5])
    region_of(text).static_forwards.clear()
    for nodes in (1, 2, 3, 4, 5, 9):
        assert text.logits(chain(*range(nodes))).shape == (nodes, backend.vocab_size)
    assert sorted(region_of(text).static_forwards) == [(n, 512) for n in (1, 2, 4, 8, 16)]


def test_larger_trees_run_as_they_are(backend, folders, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_NODES", 4)
    plain = load(*folders, LoadConfig(device="cpu"))
    a, b = started(backend, [3, 4, 5]), started(plain, [3, 4, 5])
    region_of(a).static_forwards.clear()
    np.testing.assert_array_equal(a.logits(chain(*range(6))), b.logits(chain(*range(6))))
    assert not region_of(a).static_forwards


def test_a_text_leaves_its_region_to_the_next(backend):
    first = started(backend, [3, 4, 5])
    first.logits(chain(6, 7))
    region = region_of(first)
    made = region.static_forwards[2, 512]
    other = started(backend, [3, 4, 5])
    assert region_of(other) is not region
    first.close()
    again = started(backend, [8])
    again.logits(chain(6, 7))
    assert again.length == 1
    assert region_of(again) is region
    assert region.static_forwards[2, 512] is made


def test_a_text_that_is_closed_twice_leaves_one_region(backend):
    backend.target.arena.spare.clear()
    text = started(backend, [3, 4, 5])
    text.close()
    text.close()
    assert len(backend.target.arena.spare) == 1


def test_a_text_that_was_decoded_leaves_its_region(backend):
    backend.target.arena.spare.clear()
    steps = decode(backend, [3, 4, 5], DecodeConfig(budget=8, max_tokens=20))
    next(steps)
    assert not backend.target.arena.spare
    steps.close()
    assert len(backend.target.arena.spare) == 1


def test_a_short_text_in_a_long_ones_region_looks_at_few_columns(backend):
    long = started(backend, [1] * 700, 1024)
    region_of(long).static_forwards.clear()
    long.logits(chain(6, 7))
    region = region_of(long)
    long.close()
    backend.target.arena.spare[:] = [region]
    short = started(backend, [3, 4, 5])
    assert region_of(short) is region
    short.logits(chain(6, 7))
    assert set(region.static_forwards) == {(2, 1024), (2, 512)}
    assert region.static_forwards[2, 512].columns == 512


def test_a_text_that_went_wrong_spoils_no_other(backend):
    expected = started(backend, [3, 4, 5]).logits(chain(6, 7, 8))
    broken = started(backend, [3, 4, 5])
    with torch.inference_mode():
        region_of(broken).storage.fill_(torch.nan)
    broken.close()
    np.testing.assert_array_equal(started(backend, [3, 4, 5]).logits(chain(6, 7, 8)), expected)


def test_a_text_may_begin_with_a_tree(backend):
    backend.target.arena.spare.clear()
    fresh = TextSession(backend)
    assert region_of(fresh) is None
    np.testing.assert_allclose(
        fresh.logits(chain(3, 4, 5))[2], started(backend, [3, 4]).logits(chain(5))[0], atol=1e-5
    )


def test_a_longer_text_takes_a_larger_region(backend):
    short = started(backend, [3, 4, 5])
    short.logits(chain(6, 7))
    left = region_of(short)
    short.close()
    long = started(backend, [1] * 700, 710)
    long.logits(chain(6))
    region = region_of(long)
    assert region is not left
    assert region.storage.shape[3] == 1024
    assert all(made.text.region is region for made in region.static_forwards.values())


def test_a_tree_beyond_the_region_runs_as_it_is(backend, folders):
    plain = load(*folders, LoadConfig(device="cpu"))
    prompt, tree = [1] * 61, chain(6, 7, 8)  # the text would need 64 columns, padding included
    backend.target.arena.spare.clear()
    a, b = started(backend, prompt, 64), started(plain, prompt, 64)
    region_of(a).static_forwards.clear()
    np.testing.assert_array_equal(a.logits(tree), b.logits(tree))
    assert not region_of(a).static_forwards


def test_what_earlier_texts_left_is_not_seen(backend):
    text, tree = started(backend, [3, 4, 5]), chain(6, 7, 8)
    expected = text.logits(tree)
    with torch.inference_mode():
        region_of(text).storage[:, :, :, text.length :] = 1e4
    np.testing.assert_array_equal(text.logits(tree), expected)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])  # the latter with a sliding window
def test_a_forward_is_a_function_of_tensors_alone(tmp_path, family):
    """Recorded once and replayed for another text, as a graph is, it computes the same."""
    write_target(tmp_path, family, seed=1)
    backend = load(tmp_path, None, LoadConfig(device="cpu", cuda_graphs=True))
    text, tree = started(backend, [3, 4, 5]), chain(6, 7, 8)
    text.logits(tree)
    forward = region_of(text).static_forwards[4, 512]
    inputs = forward.inputs

    def run(given):
        forward.inputs = given
        return forward.run()[0]

    with torch.inference_mode():
        replay = make_fx(run)(inputs.clone())
        forward.inputs = inputs
        text.extend([9, 10, 11, 12] * 10)
        text.logits(tree)  # fills the inputs
        actual = replay(inputs)[:3].numpy()
    plain = started(
        load(tmp_path, None, LoadConfig(device="cpu")), [3, 4, 5] + [9, 10, 11, 12] * 10
    )
    np.testing.assert_allclose(actual, plain.logits(tree), atol=1e-5)


@pytest.mark.parametrize("drafts", [False, True])
def test_the_size_of_a_state_is_known_before_the_first_text(folders, drafts):
    target, drafter = folders
    config = LoadConfig(device="cpu", cuda_graphs=True)
    backend = load(target, drafter if drafts else None, config)
    expected = backend.state_nbytes(700, drafts=drafts)
    backend.target.arena.spare.clear()
    with TextSession(backend, drafts=drafts, capacity=700) as text:
        root = text.extend([3, 4, 5])
        if drafts:
            text.draft(root)
        assert text.state.nbytes == expected
    assert backend.state_nbytes(700, drafts=drafts) == expected


def test_the_smallest_region_that_is_large_enough_is_taken(backend):
    arena = backend.target.arena
    arena.spare.clear()
    texts = [started(backend, [3, 4, 5], capacity) for capacity in (1000, 200, 100)]
    large, middle, small = map(region_of, texts)
    for text in texts:
        text.close()
    assert [region_of(started(backend, [3], 128)), region_of(started(backend, [3], 129))] == [
        small,
        middle,
    ]
    assert arena.spare == [large]


def test_threads_take_different_regions():
    class Slow(list):
        """Lets other threads run while one searches."""

        def __iter__(self):
            for region in super().__iter__():
                time.sleep(1e-3)
                yield region

    arena, like = StaticArena(1), torch.zeros(1, 1, 1, 1)
    arena.spare = Slow([arena.take(1, like)])
    both_search = threading.Barrier(2)

    def take(_):
        both_search.wait()
        return arena.take(1, like)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(take, range(2))
    assert first is not second


def test_texts_side_by_side_keep_apart(backend):
    config = DecodeConfig(budget=8, max_tokens=20)
    prompts = [5, 6, 7], [9, 8]
    alone = [[step.tokens for step in decode(backend, prompt, config)] for prompt in prompts]
    running = [decode(backend, prompt, config) for prompt in prompts]
    found = [[], []]
    while any(running):
        for n, steps in enumerate(running):
            step = next(steps, None) if steps else None
            if step is None:
                running[n] = None
            else:
                found[n].append(step.tokens)
    assert found == alone
