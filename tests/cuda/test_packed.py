"""Several texts in one forward pass: each attends as it does alone."""

import numpy as np
import pytest
from failures import failing

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.comparisons import random_tokens, random_tree
from treeflash.testing.models import write_pair

require("torch")

import torch
from torch import nn
from treeflash_cuda.attention import AttentionContext, AttentionInputs, PackedContext
from treeflash_cuda.backend import load
from treeflash_cuda.cache import Arena, KVCache, TreeCache

VOCAB = 40


@pytest.fixture(params=["qwen3", "mistral", "qwen3_moe"])  # mistral has a sliding window
def backend(request, tmp_path):
    return load(*write_pair(tmp_path, request.param, vocab_size=VOCAB), LoadConfig(device="cpu"))


def test_rows_of_all_texts_are_one_sequence_without_padding(backend):
    rows = []
    backend.target.layers[0].register_forward_hook(lambda _, args, __: rows.append(args[0].shape))
    texts = [SequenceSession(backend) for _ in range(3)]
    work = [Prefill(text.state, [3] * n, None) for n, text in enumerate(texts, 2)]
    backend.verifier.run(work)
    assert [tuple(shape[:2]) for shape in rows] == [(1, 2 + 3 + 4)]


def test_trees_and_new_tokens_of_texts_are_as_alone(backend):
    rng = np.random.default_rng(4)
    prompts = [random_tokens(rng, VOCAB, n) for n in (1, 12, 5)]
    trees = [random_tree(rng, 7, n, VOCAB) for n in (9, 1, 20)]
    new = random_tokens(rng, VOCAB, 15)
    together, alone = ([SequenceSession(backend, drafts=True) for _ in range(4)] for _ in range(2))
    for texts in (together, alone):
        for text, prompt in zip(texts, prompts, strict=False):
            text.extend(prompt)
    params = SamplingParams(log_probs=VOCAB)

    def work(texts):
        verify = [Verify(x.state, tree, params) for x, tree in zip(texts, trees, strict=False)]
        return [verify[0], Prefill(texts[3].state, new, params), *verify[1:]]

    batch = backend.verifier.run(work(together))
    single = [sampled for item in work(alone) for sampled in backend.verifier.run([item])]
    for mine, theirs in zip(batch, single, strict=True):
        assert mine.tokens.tolist() == theirs.tokens.tolist()
        np.testing.assert_allclose(mine.log_probs.values, theirs.log_probs.values, atol=1e-5)
    for mine, theirs in zip(together, alone, strict=True):
        mine_kv, theirs_kv = mine.state.read_kv_cache(), theirs.state.read_kv_cache()
        np.testing.assert_allclose(mine_kv, theirs_kv, atol=1e-5)


def test_a_failed_call_changes_no_text(backend):
    """Whatever fails after the forward pass: the call can be repeated."""
    texts, fresh = ([SequenceSession(backend, drafts=True) for _ in range(2)] for _ in range(2))
    tree = DraftTree.from_parents(np.arange(4, dtype=np.int32), np.array([-1, 0, 0, 2], np.int32))

    def extend(texts):
        backend.verifier.run([Prefill(text.state, [3, 4, 5], None) for text in texts])

    def commit(texts):
        path = np.array([0, 2, 3], np.int32)
        backend.verifier.commit([(text.state, path) for text in texts])

    for call in (extend, commit):
        if call is commit:
            for group in (texts, fresh):
                backend.verifier.logits([(text.state, tree) for text in group])
        error = RuntimeError("out of memory")
        with failing(backend.drafter_model, "project", error), pytest.raises(RuntimeError):
            call(texts)
        call(texts)
        call(fresh)
    for mine, theirs in zip(texts, fresh, strict=True):
        assert mine.length == theirs.length == 6
        assert (mine.state.read_kv_cache() == theirs.state.read_kv_cache()).all()
        assert torch.equal(torch.cat(mine.state.context), torch.cat(theirs.state.context))


@torch.inference_mode()
def test_a_layer_that_changes_its_mask_is_refused():
    texts = [KVCache(Arena(1), 10) for _ in range(2)]
    cache = TreeCache(texts, [1, 1])
    contexts = [AttentionContext(0, torch.arange(1), None) for _ in texts]
    context = PackedContext(contexts, cache)
    x = torch.zeros(1, 2, 2, 4)
    cache.update(x, x, 0)
    mask = context.mask(lambda b, h, q, k: k <= q, torch.float32, None)
    given = {"module": nn.Identity(), "query": x, "key": x, "value": x, "scale": 1.0}
    assert context.attend(AttentionInputs(mask=mask, **given)).shape == (1, 2, 2, 4)
    with pytest.raises(UnsupportedModelError, match="Identity changes its mask"):
        context.attend(AttentionInputs(mask=mask + 1, **given))
