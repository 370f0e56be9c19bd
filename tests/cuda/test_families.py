"""Model types of transformers whose layers or caches are unlike others'."""

import numpy as np
import pytest
from parts import load_with_parts, use_models

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.interfaces import Prefill
from treeflash.decoding.probe import tree_difference
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.comparisons import random_tokens
from treeflash.testing.models import write_drafter

require("torch")

import torch
from families import cuda as families
from treeflash_cuda.backend import load
from treeflash_cuda.verifier import FIRST_CHUNK

pytestmark = pytest.mark.sample(1)


@pytest.fixture(scope="module")
def capped(tmp_path_factory):
    """Pairs whose scores are soft-capped or have sinks, and transformers' models of the targets."""
    pairs = {}
    for name in ("gemma2", "gpt_oss"):
        target, drafter = (tmp_path_factory.mktemp(name) for _ in range(2))
        model = families.write(target, name)
        write_drafter(drafter, target, seed=2)
        pairs[name] = model, target, drafter
    return pairs


@pytest.mark.parametrize(
    ("name", "operations", "reads_cache"),
    [
        ("gemma3n_text", False, True),  # its last layers share keys and values of earlier ones
        ("gemma3n_text", True, True),
        ("jetmoe", False, False),  # repeats keys in another order than others
        ("jetmoe", True, False),
        ("diffllama", True, False),  # attends twice, with other values
    ],
)
def test_layers_attend_to_keys_that_they_share_or_change(
    tmp_path, name, operations, reads_cache, monkeypatch
):
    """In trees alone and side by side."""
    model = families.write(tmp_path, name)
    if operations:
        backend = load_with_parts(monkeypatch, tmp_path)
    else:
        backend = load(tmp_path, None, LoadConfig(device="cpu", dtype="float32"))
    assert backend.target.reads_cache == reads_cache
    prompts = [random_tokens(np.random.default_rng(n), 96, n) for n in (20, 3)]
    tree = DraftTree.from_parents(np.array([5, 6, 7, 8]), np.array([-1, 0, 0, 1], np.int32))
    states = [backend.open(60, drafts=False) for _ in prompts]
    backend.verifier.run([Prefill(*x, None) for x in zip(states, prompts, strict=True)])
    together = backend.verifier.logits([(state, tree) for state in states]).logits
    for state, prompt, found in zip(states, prompts, together, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([[*prompt, 5, 6, 8]])).logits[0, -1].numpy()
        (alone,) = backend.verifier.logits([(state, tree)]).logits
        np.testing.assert_allclose(found[3], expected, atol=1e-4 * expected.std())
        np.testing.assert_allclose(alone[3], expected, atol=1e-4 * expected.std())
    half = load(tmp_path, None, LoadConfig(device="cpu", dtype="bfloat16"))
    reason = "does not attend to the keys that it stores" if reads_cache else "change what they"
    assert reason in half.inexact


@pytest.mark.parametrize(
    ("name", "variant"), [("gemma2", "soft-capped scores"), ("gpt_oss", "attention sinks")]
)
def test_variants_of_attention_have_no_exact_mode_on_a_cpu(capped, name, variant, monkeypatch):
    use_models(monkeypatch)
    _, target, drafter = capped[name]
    reason = f"it does not support {variant}"
    assert reason in load(target, drafter, LoadConfig(device="cpu", dtype="bfloat16")).inexact
    with pytest.raises(UnsupportedModelError, match=reason):
        load(target, drafter, LoadConfig(device="cpu", dtype="bfloat16", exact=True))


@pytest.mark.sample(2)
@pytest.mark.parametrize("operations", [False, True], ids=["masks", "operations"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_soft_capped_scores_and_sinks_are_those_of_transformers(
    capped, name, operations, monkeypatch
):
    """In prompts of one and of several chunks, in trees, alone and side by side."""
    model, target, drafter = capped[name]
    if operations:
        backend = load_with_parts(monkeypatch, target, drafter)
    else:
        use_models(monkeypatch)
        backend = load(target, drafter, LoadConfig(device="cpu", dtype="float32"))
    assert (backend.target.softcap is None, backend.target.has_sinks) == (
        (False, False) if name == "gemma2" else (True, True)
    )
    assert tree_difference(backend, np.random.default_rng(0), 24) < 1e-4
    config = DecodeConfig(budget=6, max_tokens=8, suffix=False)
    prompts = [random_tokens(np.random.default_rng(n), 96, n) for n in (300, 30)]
    expected = []
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        settings = {"attention_mask": torch.ones_like(inputs), "eos_token_id": None}
        with torch.inference_mode():
            text = model.generate(inputs, max_new_tokens=8, do_sample=False, **settings)
        expected.append(text[0, len(prompt) :].tolist())
    requests = [Request(prompt_ids=prompt, config=config) for prompt in prompts]
    for chunk in (FIRST_CHUNK, 270):
        backend.verifier.first_chunk = chunk
        tokens: list[list[int]] = [[], []]
        for request, step in Scheduler(backend).decode(requests):
            tokens[requests.index(request)] += step.tokens
        assert tokens == expected


def test_a_model_may_use_its_cache_as_in_earlier_versions(tmp_path, monkeypatch):
    """Before transformers 5.24 it had another name, and was asked otherwise for earlier states."""
    model = families.write(tmp_path, "mamba2")
    forward = type(model).forward

    def earlier_forward(self, input_ids=None, cache_params=None, **kwargs):
        if cache_params is not None:
            assert not cache_params.has_previous_state()
        return forward(self, input_ids, cache=cache_params, **kwargs)

    monkeypatch.setattr(type(model), "forward", earlier_forward)
    backend = load(tmp_path, None, LoadConfig(device="cpu", dtype="float32"))
    assert backend.target.states_nbytes > 0
