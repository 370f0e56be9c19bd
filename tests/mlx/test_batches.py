"""Several texts in one pass: each is what it would be alone."""

from dataclasses import replace

import numpy as np
import pytest

from treeflash.config import METHODS, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler, decode
from treeflash.decoding.choices import Choice
from treeflash.decoding.interfaces import Extension, Verification
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import NumericalError
from treeflash.testing import require
from treeflash.testing.texts import path_to, random_tokens, random_tree

require("mlx.core")
require("mlx_lm")

import mlx.core as mx  # noqa: E402
from treeflash_mlx.backend import MlxBackend, load, runs_batches  # noqa: E402
from treeflash_mlx.target import Target  # noqa: E402

CHUNK = 512
BITS = pytest.mark.parametrize("kv_bits", [None, 8])
# In groups of quantised values a rounding difference becomes a step.
TOLERANCE = {None: 2e-4, 8: 0.05}


class Text(TextSession):
    """A text that grows by random tokens."""

    def __init__(self, backend, rng, length, capacity=600):
        super().__init__(backend, drafts=True, capacity=capacity)
        self.rng = rng
        self.tokens = random_tokens(rng, backend.vocab_size, length)
        self.extend(self.tokens)

    def tree(self, nodes):
        (root,) = random_tokens(self.rng, self.backend.vocab_size, 1)
        return random_tree(self.rng, root, nodes, self.backend.vocab_size)

    def assert_as_prefilled(self, tolerance):
        fresh = TextSession(self.backend, drafts=True)
        fresh.extend(self.tokens)
        assert self.length == len(self.tokens)
        mine, theirs = self.state.keys_values(), fresh.state.keys_values()
        np.testing.assert_allclose(mine, theirs, atol=tolerance)
        blocks = [text.draft(1) for text in (self, fresh)]
        mine, theirs = (self.backend.drafter.log_probs(block) for block in blocks)
        np.testing.assert_allclose(mine, theirs, atol=tolerance)


def commit_together(backend, rng, texts):
    """Verify a tree of another size of each text, and commit a random path of it."""
    trees = [text.tree(int(rng.integers(1, 40))) for text in texts]
    paths = [path_to(tree, int(rng.integers(len(tree)))) for tree in trees]
    states = [text.state for text in texts]
    backend.verifier.run(
        [Verification(s, tree, Choice()) for s, tree in zip(states, trees, strict=True)]
    )
    backend.verifier.commit(list(zip(states, paths, strict=True)))
    for text, tree, path in zip(texts, trees, paths, strict=True):
        text.tokens += tree.tokens[path].tolist()


@BITS
@pytest.mark.parametrize("count", [2, 3, 5])
def test_texts_together_give_the_tokens_of_each_alone(pair, rng, count, kv_bits):
    """Of any length, method and tree size."""
    backend = load(*pair, LoadConfig(kv_bits=kv_bits))
    scheduler, expected = Scheduler(backend), {}
    for i in range(count):
        prompt = random_tokens(rng, backend.vocab_size, int(rng.integers(1, 40)))
        sampling = SamplingConfig(temperature=0.8 * (i % 2), top_p=0.9, seed=i)
        config = DecodeConfig(
            method=METHODS[-1 - i], budget=3 + 9 * i, max_tokens=25, sampling=sampling
        )
        ticket = scheduler.submit(Request(prompt_ids=prompt, config=config))
        plain = decode(backend, prompt, replace(config, method="ar"))
        expected[ticket] = [token for step in plain for token in step.tokens]
    found = {ticket: [] for ticket in expected}
    while scheduler.busy:
        for ticket, step in scheduler.step():
            found[ticket] += step.tokens
    assert found == expected


@BITS
def test_logits_of_a_batch_equal_those_alone(pair, rng, kv_bits):
    backend = load(*pair, LoadConfig(kv_bits=kv_bits))
    assert backend.target.batches
    texts = [Text(backend, rng, length) for length in (3, 41, 1, 260)]
    trees = [text.tree(nodes) for text, nodes in zip(texts, (30, 1, 7, 40), strict=True)]
    states = [text.state for text in texts]
    together = backend.verifier.logits(list(zip(states, trees, strict=True)))
    reverse = backend.verifier.logits(list(zip(states, trees, strict=True))[::-1])
    assert len({id(state.key_values.storage) for state in states}) == 1
    for text, tree, logits, again in zip(texts, trees, together, reverse[::-1], strict=True):
        np.testing.assert_array_equal(logits, again)
        np.testing.assert_allclose(logits, text.logits(tree), atol=2e-4)


@BITS
def test_states_after_random_commits_equal_prefills(pair, rng, kv_bits):
    """Texts join and leave the batch, are forked and truncated."""
    backend = load(*pair, LoadConfig(kv_bits=kv_bits))
    texts = [Text(backend, rng, length) for length in (2, 30, 9, 17)]
    commit_together(backend, rng, texts)
    commit_together(backend, rng, texts[::-1])
    backend.drafter.draft([(text.state, 1) for text in texts])
    commit_together(backend, rng, texts[1:])
    texts[2].state.truncate(5)
    del texts[2].tokens[5:]
    copy = Text.__new__(Text)
    copy.backend, copy.rng, copy.tokens = backend, rng, texts[1].tokens[:20]
    copy.state = texts[1].state.fork(20, 300)
    texts.append(copy)
    commit_together(backend, rng, texts)
    texts.pop(0).close()
    commit_together(backend, rng, texts)
    for text in texts:
        text.assert_as_prefilled(TOLERANCE[kv_bits])


@pytest.fixture
def _short_chunks(monkeypatch):
    monkeypatch.setattr("treeflash_mlx.verifier.PREFILL_CHUNK", CHUNK)


@pytest.mark.usefixtures("_short_chunks")
def test_short_and_long_new_tokens_run_beside_trees(pair, rng, monkeypatch):
    """Tokens no more than the largest tree share its pass; more of them have their own."""
    backend = load(*pair, LoadConfig())
    texts = [Text(backend, rng, 4, capacity=2000) for _ in range(4)]
    tree = texts[0].tree(20)
    new = [random_tokens(rng, 64, n) for n in (7, 20, CHUNK + 100)]
    choices = [Choice(log_probs=3), None, Choice(log_probs=3)]
    work = [Extension(t.state, ids, c) for t, ids, c in zip(texts[1:], new, choices, strict=True)]
    verification = Verification(texts[0].state, tree, Choice(log_probs=3))
    passes, forward = [], backend.target.forward

    def record(token_ids, *args):
        passes.append(token_ids.shape)
        return forward(token_ids, *args)

    with monkeypatch.context() as patch:
        patch.setattr(backend.target, "forward", record)
        chosen = backend.verifier.run([work[0], verification, *work[1:]])
    assert passes == [(1, CHUNK), (1, 99), (1, 1), (3, 20)]
    assert chosen[2] is None
    assert texts[0].length == 4
    for text, ids, found in zip(texts[1:], new, (chosen[0], *chosen[2:]), strict=True):
        alone = TextSession(backend, capacity=2000)
        alone.extend(text.tokens + ids[:-1])
        (logits,) = alone.logits(DraftTree.root_only(ids[-1]))
        text.tokens += ids
        text.assert_as_prefilled(2e-4)
        if found is not None:
            assert found.tokens.tolist() == [logits.argmax()]
            best = np.sort(logits - np.logaddexp.reduce(logits))[::-1]
            np.testing.assert_allclose(found.log_probs.values[0], best[:3], atol=1e-4)
    assert chosen[1].tokens.tolist() == texts[0].logits(tree).argmax(-1).tolist()


@pytest.mark.usefixtures("_short_chunks")
def test_a_call_that_fails_changes_no_text(pair, rng):
    backend = load(*pair, LoadConfig())
    texts = [Text(backend, rng, length, capacity=2000) for length in (3, 8, 5)]
    before = [(text.length, text.state.keys_values()) for text in texts]
    tree = texts[0].tree(9)
    nothing = Choice(allowed=np.zeros((len(tree), 2), np.uint32))
    work = [
        Extension(texts[1].state, random_tokens(rng, 64, 2 * CHUNK), Choice()),
        Extension(texts[2].state, [1, 2, 3], Choice()),
        Verification(texts[0].state, tree, nothing),
    ]
    with pytest.raises(NumericalError):
        backend.verifier.run(work)
    for text, (length, keys_values) in zip(texts, before, strict=True):
        assert text.length == length
        np.testing.assert_array_equal(text.state.keys_values(), keys_values)
        text.assert_as_prefilled(2e-4)


def test_states_are_written_in_place(pair, rng):
    """While the same texts run together, no array moves, whatever is committed."""
    backend = load(*pair, LoadConfig(device="cpu"))
    for count in (1, 3):
        texts = [Text(backend, rng, 5) for _ in range(count)]
        commit_together(backend, rng, texts)
        storage = texts[0].state.key_values.storage
        before = addresses(storage)
        for _ in range(3):
            commit_together(backend, rng, texts)
            assert addresses(storage) == before
        assert texts[0].state.key_values.storage is storage


def addresses(storage):
    """Where the data of all arrays is."""
    mx.eval(storage.layers)
    mx.synchronize()
    arrays = [array for layer in storage.layers for array in layer]
    return [np.array(array, copy=False).__array_interface__["data"][0] for array in arrays]


def test_the_bytes_of_a_state_are_those_announced(pair, rng):
    backend = load(*pair, LoadConfig())
    for drafts in (False, True):
        text = TextSession(backend, drafts=drafts, capacity=700)
        text.extend([1, 2, 3])
        if drafts:
            text.draft(4)
        assert text.state.nbytes == backend.state_nbytes(700, drafts=drafts)
        text.close()
        assert text.state.nbytes == 0


@pytest.mark.parametrize(
    ("family", "batches"),
    [("gemma3_text", True), ("deepseek_v3", True), ("gemma2", False), ("gpt2", False)],
)
def test_a_family_that_takes_one_text_at_a_time_is_run_so(families, tmp_path, rng, family, batches):
    """Gemma 2 adds the mask to five axes, GPT-2 has one offset for all rows."""
    families.write(tmp_path, family)
    backend = load(tmp_path, None, LoadConfig())
    assert backend.target.batches == batches
    texts = [TextSession(backend) for _ in range(3)]
    for text, length in zip(texts, (3, 30, 11), strict=True):
        text.extend(rng.integers(0, 96, length).tolist())
    nodes = (1, 1, 1) if family == "gpt2" else (5, 30, 1)
    trees = [random_tree(rng, 1, n, 96) for n in nodes]
    states = [text.state for text in texts]
    together = backend.verifier.logits(list(zip(states, trees, strict=True)))
    for text, tree, logits in zip(texts, trees, together, strict=True):
        np.testing.assert_allclose(logits, text.logits(tree), atol=2e-4)


def test_an_error_of_the_model_means_one_text_at_a_time(families, tmp_path):
    families.write(tmp_path, "gemma2")
    backend = MlxBackend(Target(tmp_path, mx.float32, None), None, None)
    assert not runs_batches(backend)
