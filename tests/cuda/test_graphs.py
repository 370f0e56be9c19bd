"""Static forward passes: shared by texts one after the other, and functions of tensors alone."""

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.decoding.tree import DraftTree
from treeflash.testing import require
from treeflash.testing.models import write_drafter, write_target

require("torch")

import torch  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from treeflash_cuda import graphs  # noqa: E402
from treeflash_cuda.backend import load  # noqa: E402

GREEDY = SamplingConfig()


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


def started(backend, prompt):
    verifier = backend.verifier(features=False)
    verifier.prefill(prompt, GREEDY, None)
    return verifier


def test_trees_are_filled_up_to_powers_of_two(backend):
    verifier = started(backend, [3, 4, 5])
    verifier.cache.forwards.clear()
    for nodes in (1, 2, 3, 4, 5, 9):
        assert verifier.logits(chain(*range(nodes))).shape == (nodes, backend.vocab_size)
    assert sorted(verifier.cache.forwards) == [(n, 512) for n in (1, 2, 4, 8, 16)]


def test_larger_trees_run_as_they_are(backend, folders, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_NODES", 4)
    plain = load(*folders, LoadConfig(device="cpu"))
    a, b = started(backend, [3, 4, 5]), started(plain, [3, 4, 5])
    a.cache.forwards.clear()
    np.testing.assert_array_equal(a.logits(chain(*range(6))), b.logits(chain(*range(6))))
    assert not a.cache.forwards


def test_a_text_leaves_its_storage_to_the_next(backend):
    first = started(backend, [3, 4, 5])
    first.logits(chain(6, 7))
    made, storage = first.cache.forwards[2, 512], first.cache.key_values.storage
    other = started(backend, [3, 4, 5])
    assert other.cache is not first.cache
    first.close()
    again = started(backend, [8])
    again.logits(chain(6, 7))
    assert again.length == 1
    assert again.cache.key_values.storage is storage
    assert again.cache.forwards[2, 512] is made


def test_a_text_that_is_closed_twice_leaves_one_storage(backend):
    backend.cache_pool.spare.clear()
    text = started(backend, [3, 4, 5])
    text.close()
    text.close()
    assert len(backend.cache_pool.spare) == 1


def test_a_text_that_was_decoded_leaves_its_storage(backend):
    backend.cache_pool.spare.clear()
    steps = decode(backend, [3, 4, 5], DecodeConfig(budget=8, max_tokens=20))
    next(steps)
    assert not backend.cache_pool.spare
    steps.close()
    assert len(backend.cache_pool.spare) == 1


def test_a_short_text_in_a_long_ones_storage_looks_at_few_columns(backend):
    long = started(backend, [1] * 700)
    long.logits(chain(6, 7))
    storage = long.cache.key_values.storage
    long.close()
    short = started(backend, [3, 4, 5])
    assert short.cache.key_values.storage is storage
    short.logits(chain(6, 7))
    assert set(short.cache.forwards) == {(2, 1024), (2, 512)}
    assert short.cache.forwards[2, 512].columns == 512


def test_a_text_that_went_wrong_spoils_no_other(backend):
    expected = started(backend, [3, 4, 5]).logits(chain(6, 7, 8))
    broken = started(backend, [3, 4, 5])
    with torch.inference_mode():
        broken.cache.key_values.storage.fill_(torch.nan)
    broken.close()
    np.testing.assert_array_equal(started(backend, [3, 4, 5]).logits(chain(6, 7, 8)), expected)


def test_a_text_may_begin_with_a_tree(backend):
    backend.cache_pool.spare.clear()
    fresh = backend.verifier(features=False)
    assert fresh.cache.key_values.storage is None
    np.testing.assert_allclose(
        fresh.logits(chain(3, 4, 5))[2], started(backend, [3, 4]).logits(chain(5))[0], atol=1e-5
    )


def test_an_outgrown_storage_is_let_go(backend):
    verifier = started(backend, [3, 4, 5])
    verifier.logits(chain(6, 7))
    old = verifier.cache.key_values.storage
    verifier.prefill([1] * 700, GREEDY, None)
    verifier.logits(chain(6))
    assert verifier.cache.key_values.storage.shape[3] == 1024
    assert all(made.storage is not old for made in verifier.cache.forwards.values())


def test_what_earlier_texts_left_is_not_seen(backend):
    verifier = started(backend, [3, 4, 5])
    tree = chain(6, 7, 8)
    expected = verifier.logits(tree)
    with torch.inference_mode():
        verifier.cache.key_values.storage[:, :, :, verifier.length :] = 1e4
    np.testing.assert_array_equal(verifier.logits(tree), expected)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])  # the latter with a sliding window
def test_a_forward_is_a_function_of_tensors_alone(tmp_path, family):
    """Recorded once and replayed for another text, as a graph is, it computes the same."""
    write_target(tmp_path, family, seed=1)
    backend = load(tmp_path, None, LoadConfig(device="cpu", cuda_graphs=True))
    verifier, tree = started(backend, [3, 4, 5]), chain(6, 7, 8)
    verifier.logits(tree)
    cache, forward = verifier.cache, verifier.cache.forwards[4, 512]
    inputs = forward.inputs

    def run(given):
        forward.inputs = given
        return forward.run(cache)[0]

    with torch.inference_mode():
        replay = make_fx(run)(inputs.clone())
        forward.inputs = inputs
        verifier.prefill([9, 10, 11, 12] * 10, GREEDY, None)
        verifier.logits(tree)  # fills the inputs
        actual = replay(inputs)[:3].numpy()
    plain = started(
        load(tmp_path, None, LoadConfig(device="cpu")), [3, 4, 5] + [9, 10, 11, 12] * 10
    )
    np.testing.assert_allclose(actual, plain.logits(tree), atol=1e-5)


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
