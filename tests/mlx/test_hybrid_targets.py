"""Targets with recurrent layers, of every model type of mlx-lm that has hooks."""

import itertools
import json
import shutil

import mlx_lm.models.gated_delta
import numpy as np
import pytest

from treeflash.config import METHODS, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_config
from treeflash.errors import UnsupportedModelError
from treeflash.testing import require
from treeflash.testing.comparisons import path_to, random_tokens, random_tree, steps_of, tokens_of
from treeflash.training.distillation import Response

require("mlx.core")
require("mlx_lm")

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from treeflash_mlx.backend import MlxBackend, load
from treeflash_mlx.target import Target, compatible_settings

# One per kind of layer: gates by head and by channel, Mamba-2, fixed decays, convolutions alone.
KINDS = ("qwen3_5", "kimi_linear", "granitemoehybrid", "bailing_hybrid", "lfm2")
TYPES = (
    *KINDS,
    "qwen3_5_moe",
    "qwen3_next",
    "olmo_hybrid",
    "kimi_k3",
    "bailing_moe_v3",
    "bailing_moe_linear",
    "mamba2",
    "nemotron_h",
    "falcon_h1",
    "plamo2",
    "lfm2_moe",
    "gear",
)
PROMPT = [5, 17, 3, 22, 8]


@pytest.fixture(scope="module")
def backend_of(hybrid_pair_of):
    """The pairs of `hybrid_pair_of`, each loaded once."""
    loaded = {}

    def backend(name):
        if name not in loaded:
            loaded[name] = load(*hybrid_pair_of(name), LoadConfig())
        return loaded[name]

    return backend


def text_of(backend, length, **settings):
    config = DecodeConfig(max_tokens=length, **settings)
    steps = steps_of(backend, PROMPT, config)
    return tokens_of(steps), len(steps)


def plain_model(folder):
    """The model as mlx-lm loads it, without hooks."""
    return load_model(folder, model_config=compatible_settings(read_config(folder)))[0]


def mlx_lm_text(folder, length):
    """What mlx-lm itself generates, greedily."""
    steps = generate_step(mx.array(PROMPT), plain_model(folder), max_tokens=length)
    return [int(token) for token, _ in itertools.islice(steps, length)]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", KINDS)
def test_text_equals_that_of_mlx_lm(backend_of, hybrid_pair_of, name):
    text, steps = text_of(backend_of(name), 40, method="treeflash", budget=64)
    assert text == mlx_lm_text(hybrid_pair_of(name)[0], 40)
    assert len(text) / steps > 1.3


def fit(drafter, target, texts):
    """Fit a drafter to texts of the target."""
    require("torch")
    from fitted_drafters import fit_drafter

    responses = [Response(prompt_ids=tuple(PROMPT), response_ids=tuple(text)) for text in texts]
    layer_ids = read_config(drafter)["dflash_config"]["target_layer_ids"]
    target.capture(layer_ids)
    features = []
    for response in responses:
        kv_cache = target.new_kv_cache(len(response))
        tokens = mx.array([response.token_ids])
        features.append(np.array(target.forward(tokens, [kv_cache], tuple(layer_ids))[1][0]))
    weights = (np.array(x.weight) for x in (target.embedding, target.output_module))
    fit_drafter(drafter, responses, features, *weights, layers=len(target.layers))


@pytest.mark.nightly
@pytest.mark.parametrize("name", TYPES)
def test_every_method_equals_mlx_lm_and_plain_decoding(hybrid_pair_of, tmp_path, name):
    folder, random_drafter = hybrid_pair_of(name)
    plain, drafter = load(folder, None, LoadConfig()), tmp_path / "drafter"
    samplings = SamplingConfig(), SamplingConfig(temperature=0.9, seed=7)
    texts = [text_of(plain, 200, method="ar", sampling=x)[0] for x in samplings]
    assert texts[0] == mlx_lm_text(folder, 200)
    shutil.copytree(random_drafter, drafter)
    fit(drafter, plain.target, texts)
    backend = load(folder, drafter, LoadConfig())
    for text, sampling in zip(texts, samplings, strict=True):
        for method, budget in itertools.product(METHODS[1:], (16, 64)):
            settings = {"method": method, "budget": budget, "sampling": sampling}
            drafted, steps = text_of(backend, 200, **settings)
            assert drafted == text, (method, budget)
            assert (len(text) - 1) / (steps - 1) > 1.3, (method, budget)


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", TYPES)
def test_states_after_commits_equal_those_of_a_prefill(families, tmp_path, rng, name):
    """Passes that nobody commits leave nothing behind; sequences join and leave a batch."""
    families.write(tmp_path, name)
    target = Target(tmp_path, mx.float32, None)
    target.check_drafting()
    target.check_trees()
    backend = MlxBackend(target, None, None)
    target.batches = True
    lengths = (1, 20, 7)
    tokens = [random_tokens(rng, target.vocab_size, length) for length in lengths]
    sequences = [SequenceSession(backend) for _ in lengths]
    for sequence, prompt in zip(sequences, tokens, strict=True):
        sequence.extend(prompt)
    for members in ((0, 1, 2), (1,), (0, 2), (2, 1, 0)):
        sizes = rng.choice((1, 2, 9, 30), len(members))
        trees = [random_tree(rng, 1, int(n), target.vocab_size) for n in sizes]
        states = [sequences[i].state for i in members]
        sequences[members[0]].logits(random_tree(rng, 2, 5, target.vocab_size))
        sequences[members[0]].logits(DraftTree.root_only(3))
        verified = backend.verifier.logits(list(zip(states, trees, strict=True)))
        for i, tree in zip(members, trees, strict=True):  # one by one, from the same pass
            path = path_to(tree, int(rng.integers(len(tree))))
            backend.verifier.commit(verified, [(sequences[i].state, path)])
            tokens[i] += tree.tokens[path].tolist()
    for sequence, prompt in zip(sequences, tokens, strict=True):
        fresh = SequenceSession(backend)
        fresh.extend(prompt)
        assert sequence.length == fresh.length == len(prompt)
        found, expected = (x.state.read_recurrent_states() for x in (sequence, fresh))
        assert found
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.shape == theirs.shape
            np.testing.assert_allclose(mine, theirs, atol=1e-4 * max(1, np.abs(theirs).max()))
        probe = DraftTree.root_only(2)
        expected = fresh.logits(probe)
        np.testing.assert_allclose(sequence.logits(probe), expected, atol=1e-3 * expected.std())


def test_nothing_of_mlx_lm_is_patched(backend_of, hybrid_pair_of):
    original = mlx_lm.models.gated_delta.gated_delta_update
    hooked = backend_of("qwen3_5").target.model
    plain = plain_model(hybrid_pair_of("qwen3_5")[0])
    module = type(plain.layers[0].linear_attn)
    assert type(hooked.layers[0].linear_attn) is not module
    assert module.__call__.__globals__["gated_delta_update"] is original
    tokens = mx.array([PROMPT])
    assert mx.array_equal(plain(tokens), hooked(tokens))


def test_memory_of_the_states_is_counted(backend_of):
    backend = backend_of("granitemoehybrid")
    with SequenceSession(backend, capacity=100) as sequence:
        sequence.extend(PROMPT)
        states = sum(state.nbytes for state in sequence.state.read_recurrent_states())
        assert backend.target.states_nbytes == states > 0
        assert sequence.state.nbytes <= backend.state_nbytes(100, drafts=False)
        before = sequence.state.nbytes
        sequence.state.snapshot()
        assert sequence.state.nbytes == before + states


def test_files_of_transformers_load(families, tmp_path):
    """Their text models have types, and OLMo-Hybrid's norms names, that mlx-lm lacks."""

    def logits(folder):
        target = Target(folder, mx.float32, None)
        tokens = mx.array([PROMPT])
        return target.forward(tokens, [target.new_kv_cache(9)], ())[0]

    def copy(name, model_type, rename):
        folder = tmp_path / name
        families.write(folder, name)
        config, weights = read_config(folder), mx.load(str(folder / "model.safetensors"))
        (folder / "other").mkdir()
        config = config.get("text_config", config) | {"model_type": model_type}
        (folder / "other" / "config.json").write_text(json.dumps(config))
        weights = {rename(name): x for name, x in weights.items()}
        mx.save_safetensors(str(folder / "other" / "model.safetensors"), weights, {"format": "mlx"})
        return folder, folder / "other"

    def published(name):
        name = name.replace("input_layernorm", "attention_layer_norm")
        return name.replace("post_attention_layernorm", "feedforward_layer_norm")

    for folders in (
        copy("qwen3_5", "qwen3_5_text", lambda name: name.removeprefix("language_model.")),
        copy("olmo_hybrid", "olmo_hybrid", published),
    ):
        mine, theirs = map(logits, folders)
        assert mx.array_equal(mine, theirs)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["mamba", "jamba", "recurrent_gemma", "rwkv7", "baichuan_m1"])
def test_a_recurrence_without_hooks_is_refused_with_the_reason(hybrid_pair_of, name):
    with pytest.raises(UnsupportedModelError, match=f"^{name} models cannot run a draft tree: "):
        load(*hybrid_pair_of(name), LoadConfig())
    backend = load(hybrid_pair_of(name)[0], None, LoadConfig())
    assert text_of(backend, 12, method="ar")[0] == mlx_lm_text(hybrid_pair_of(name)[0], 12)
