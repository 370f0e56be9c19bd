"""Model types of transformers whose layers, caches or positions are unlike others'."""

import numpy as np
import pytest
from parts import load_with_parts, use_models

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler, decode
from treeflash.decoding.interfaces import Prefill
from treeflash.decoding.probe import tree_difference
from treeflash.decoding.tree import DraftTree
from treeflash.errors import PromptError, UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.comparisons import generate, random_tokens
from treeflash.testing.models import write_drafter

require("torch")

import torch
import transformers
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


CPU = LoadConfig(device="cpu", dtype="float32")
POSITIONS = 32
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": POSITIONS,
}


def write(folder, config):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "target")
    write_drafter(folder / "drafter", folder / "target", seed=2)
    return load(folder / "target", folder / "drafter", CPU)


@pytest.fixture(scope="module", params=["a table of positions", "frequencies by the last position"])
def backend(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    if request.param.startswith("a table"):
        positions = {"max_position_embeddings": POSITIONS, "word_embed_proj_dim": 32}
        return write(folder, transformers.OPTConfig(**SHAPE, **positions, ffn_dim=64))
    positions = {"original_max_position_embeddings": POSITIONS, "rope_parameters": LONGROPE}
    shape = {**SHAPE, "max_position_embeddings": 4 * POSITIONS, "intermediate_size": 64}
    return write(folder, transformers.Phi3Config(**shape, **positions, eos_token_id=1))


def test_texts_that_reach_the_last_position_are_those_of_plain_decoding(backend):
    assert backend.max_positions == POSITIONS
    for first in (3, 5):
        prompt = list(range(first, first + 5))
        plain = generate(backend, prompt, DecodeConfig(method="ar"))
        assert len(plain) == POSITIONS - len(prompt)
        for method in ("dflash", "ddtree", "treeflash"):
            config = DecodeConfig(method=method, budget=32)
            assert generate(backend, prompt, config) == plain, method


def test_longer_prompts_are_refused(backend):
    with pytest.raises(PromptError, match=f"the target's limit is {POSITIONS}"):
        decode(backend, Request(prompt_ids=[5] * POSITIONS, config=DecodeConfig(method="ar")))
