"""The drafter against the reference, and the memory that its features take."""

from dataclasses import replace

import numpy as np
import pytest
from parts import load_with_parts

from treeflash.config import LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.reference.backend import load as load_reference
from treeflash.testing import require
from treeflash.testing.models import edit_config, write_drafter, write_pair, write_target

require("torch")

import torch
from treeflash_cuda import verifier as verifier_module
from treeflash_cuda.backend import load

CPU = LoadConfig(device="cpu", dtype="float32")
PROMPT = [3, 4, 5, 6, 7, 8, 9]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def folders(tmp_path):
    return write_pair(tmp_path, "qwen3")


def log_probs(backend):
    """What the drafter predicts after a prompt; and its context's keys and values."""
    text = SequenceSession(backend, drafts=True)
    block = text.draft(text.extend(PROMPT))
    return backend.drafter.log_probs(block), text.state.read_drafter_kv_cache()


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.update(input_embedding_scale=2.5),
        lambda config: config.update(rope_parameters=YARN),
    ],
    ids=["scaled embeddings", "scaled rotations"],
)
def test_scales_of_the_configuration_are_applied(folders, edit):
    plain, _ = log_probs(load(*folders, CPU))
    edit_config(folders[1], edit)
    actual, expected = log_probs(load(*folders, CPU)), log_probs(load_reference(*folders, CPU))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.abs(actual[0] - plain).max() > 1e-2


def test_frequencies_stay_in_float32(folders):
    exact = load(*folders, CPU).drafter_model.rotary.inv_freq
    half = load(*folders, LoadConfig(device="cpu", dtype="bfloat16")).drafter_model
    assert half.fc.weight.dtype == torch.bfloat16
    assert torch.equal(half.rotary.inv_freq, exact)
    assert half.rotary.inv_freq.dtype == torch.float32


def test_long_prompts_are_projected_chunk_by_chunk(folders, monkeypatch):
    """Outputs of several layers are larger than what is made of them."""
    backend = load(*folders, CPU)
    prompt = np.random.default_rng(3).integers(0, 24, 50).tolist()
    whole = SequenceSession(backend, drafts=True)
    whole.extend(prompt)
    monkeypatch.setattr(verifier_module, "FIRST_CHUNK", 16)
    monkeypatch.setattr(verifier_module, "NEXT_CHUNK", 8)
    rows = []
    backend.drafter_model.fc.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    text = SequenceSession(backend, drafts=True)
    text.extend(prompt)
    assert rows == [16, 8, 8, 8, 8, 2]
    features = torch.cat(text.state.context)
    assert features.shape == (50, 32)
    torch.testing.assert_close(features, *whole.state.context, atol=1e-5, rtol=1e-4)


def test_waiting_features_are_projected(folders):
    backend = load(*folders, CPU)
    text = SequenceSession(backend, drafts=True)
    text.extend(PROMPT)
    assert [features.shape for features in text.state.context] == [(len(PROMPT), 32)]


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("sliding_window", [None, 7])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_window_of_the_context_matches_reference(
    tmp_path, monkeypatch, window, sliding_window, parts
):
    """The first few positions and the latest, within the windows of layers that have one."""
    folders = tmp_path / "target", tmp_path / "drafter"
    write_target(folders[0], "qwen3", seed=1)
    write_drafter(folders[1], folders[0], seed=2, sliding_window=sliding_window)
    config = replace(CPU, draft_window=window)
    ours = (
        load_with_parts(monkeypatch, *folders, draft_window=window)
        if parts
        else load(*folders, config)
    )
    found = []
    for backend in (ours, load_reference(*folders, config)):
        texts = [SequenceSession(backend, drafts=True) for _ in range(3)]
        roots = []
        for n, text in enumerate(texts):  # the last one is shorter than what is always seen
            text.draft(text.extend(PROMPT[: 7 - 3 * n]))
            roots.append((text.state, text.extend(PROMPT[2 * n :])))
        blocks = backend.drafter.draft(roots)
        found.append(np.stack([backend.drafter.log_probs(block) for block in blocks]))
    np.testing.assert_allclose(*found, atol=1e-4)
    wide = load_reference(*folders, CPU)
    text = SequenceSession(wide, drafts=True)
    text.extend(PROMPT)
    block = text.draft(text.extend(PROMPT))
    differs = np.abs(wide.drafter.log_probs(block) - found[1][0]).max() > 1e-3
    assert differs == (window < 100)
