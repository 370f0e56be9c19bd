"""Pairs of every engine: what loads, what is refused, what drafters read, their bits, and texts."""

import numpy as np
import pytest
from engines import each
from long_contexts import check_long_contexts
from recordings import recording
from stand_ins import stand_in

from treeflash.config import DecodeConfig
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import BackendError, CheckpointError, ConfigError, UnsupportedModelError
from treeflash.testing import models
from treeflash.testing.comparisons import generate, random_tokens
from treeflash.testing.models import edit_config, write_dialect, write_pair, write_target


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_dtype_is_the_one_asked_for(engine, pair, dtype):
    backend = engine.load(*pair, dtype=dtype)
    assert backend.dtype == dtype
    weights = [backend.drafter_model.fc.weight, backend.head.module.norm.weight]
    assert [str(x.dtype).rpartition(".")[2] for x in weights] == [dtype] * 2


@each(
    ("settings", "message"),
    cuda=[
        ({"kv_bits": 4}, "kv_bits must be 8 on the cuda backend, got 4"),
        ({"draft_bits": 7}, r"draft_bits must be one of \(4, 8, 16\) .* got 7"),
        ({"device_map": "auto"}, "remove device"),
        ({"memory_gb": 1}, "sets no memory aside on a CPU; remove memory_gb"),
    ],
    mlx=[
        ({"kv_bits": 7}, "kv_bits must be one of"),
        ({"draft_bits": 7}, "draft_bits must be one of"),
        ({"device": "cuda:0"}, "gpu or cpu"),
    ],
)
def test_settings_that_an_engine_lacks_are_refused(engine, pair, settings, message):
    with pytest.raises((BackendError, ConfigError), match=message):
        engine.load(*pair, **settings)


HALF_ROTATED = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}


@each(
    ("damage", "error", "message"),
    cuda=[
        ({"model_type": "lama"}, CheckpointError, r"config\.json is not usable"),
        ({"rms_norm_eps": "x"}, CheckpointError, r"config\.json is not usable.*rms_norm_eps"),
        ({"hidden_act": "silo"}, CheckpointError, "transformers does not know 'silo'"),
        (
            {"rope_parameters": HALF_ROTATED},
            CheckpointError,
            "cannot run .* with the settings .*: ",
        ),
        ({"vocab_size": 33}, CheckpointError, r"weight has the shape \(.*asks for \("),
        (
            {"layer_types": ["chunked_attention", "full_attention"] * 2},
            UnsupportedModelError,
            "llama .* have chunked_attention",
        ),
    ],
    mlx=[({"model_type": "nothing"}, UnsupportedModelError, "'nothing'")],
)
def test_a_configuration_that_makes_no_model_is_one_line(
    engine, tmp_path, capfd, damage, error, message
):
    write_target(tmp_path, "llama", seed=1)
    edit_config(tmp_path, lambda config: config.update(damage))
    with pytest.raises(error, match=message) as caught:
        engine.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("which", [0, 1], ids=["target", "drafter"])
def test_a_damaged_file_is_named(engine, pair, tmp_path, which):
    folders = []
    for i, source in enumerate(pair):
        folders.append(tmp_path / str(i))
        folders[i].mkdir()
        for file in source.iterdir():
            data = file.read_bytes()
            cut = i == which and file.suffix == ".safetensors"
            (folders[i] / file.name).write_bytes(data[: len(data) // 2] if cut else data)
    with pytest.raises(CheckpointError) as caught:
        engine.load(*folders)
    assert str(folders[which]) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_pairs_are_loaded_at_once(engine, pair):
    """What one computes is no part of another."""
    sequences = [SequenceSession(engine.load(*pair), drafts=True) for _ in range(2)]
    roots = [sequence.extend([5, 6, 7]) for sequence in sequences]
    assert roots[0] == roots[1]
    blocks = [sequence.draft(roots[0]) for sequence in sequences]
    log_probs = [x.backend.drafter.log_probs(y) for x, y in zip(sequences, blocks, strict=True)]
    assert (log_probs[0] == log_probs[1]).all()


def test_a_long_prompt_is_read_some_at_a_time(engine, pair, monkeypatch):
    """The drafts stay as they are, and no product has all rows."""
    backend = engine.load(*pair)
    check_long_contexts(monkeypatch, backend)


def assert_plain_text(backend, **settings):
    """The trees may be unlike a drafter's of more bits; the text is not."""
    texts = [
        generate(backend, [1, 2, 3], DecodeConfig(method=method, max_tokens=20, **settings))
        for method in ("ar", "treeflash")
    ]
    assert texts[0] == texts[1]


def test_features_of_a_long_prompt_are_projected_by_chunks(engine, tmp_path):
    """Outputs of several layers are larger than what is made of them."""
    backend = engine.load(*write_pair(tmp_path, "qwen3"))
    prompt, rows, drafts = random_tokens(np.random.default_rng(3), 24, 50), [], []
    for size in (100, 16):
        engine.set_chunks(backend, size)
        with recording(backend.drafter_model, "project") as calls:
            sequence = SequenceSession(backend, drafts=True)
            root = sequence.extend(prompt)
            rows.append([len(outputs) for (outputs,) in calls])
            drafts.append(backend.drafter.log_probs(sequence.draft(root)))
    assert max(rows[0]) >= 49  # MLX leaves the last ones to the draft
    assert max(rows[1]) == 16
    assert sum(rows[1]) >= 48
    np.testing.assert_allclose(*drafts, atol=1e-4)


def test_features_wait_while_drafting_pauses(engine, pair):
    """For the draft that reads them. Forks and stored states go on as the sequence does."""
    backend = engine.load(*pair)
    texts = [SequenceSession(backend, drafts=True) for _ in range(3)]
    text, restored, whole = texts
    whole.extend([3, 4, 5, *[6] * 8])
    text.extend([3, 4, 5])
    with recording(backend.drafter_model, "project") as calls:
        for _ in range(8):
            text.verify(DraftTree.root_only(6))
            text.commit(np.zeros(1, np.int32))
        assert calls == []
        fork = text.fork(text.length, text.length + 20)
        stored = text.state.export(0, text.length, end=True).arrays()
        restored.state.append(text.state.tokens, stored)
        expected = backend.drafter.log_probs(whole.draft(7))
        for other in (text, fork, restored):
            found = backend.drafter.log_probs(other.draft(7))
            np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(calls) <= len(texts) + 1
    assert not text.state.context


def test_a_sequence_without_drafts_keeps_no_features(engine, pair):
    backend = engine.load(*pair)
    with recording(backend.drafter_model, "project") as calls:
        sequence = SequenceSession(backend)
        sequence.extend([3, 4, 5])
        sequence.verify(DraftTree.root_only(6))
        sequence.commit(np.zeros(1, np.int32))
    assert calls == []
    assert sequence.state.context == []


@pytest.mark.parametrize("bits", [4, 8])
def test_a_drafter_of_few_bits_changes_no_text(engine, pair, bits):
    backend = engine.load(*pair, draft_bits=bits)
    found = engine.quantised_parts(backend)
    assert {"fc", "layers.0.mlp.up_proj", "ug.first", "ug.second"} <= found
    assert_plain_text(backend, budget=16)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "dialect", ["dflash2", "deepspec-gated", "deepspec-rnn", "specforge-domino"]
)
def test_heads_of_few_bits(engine, tmp_path, monkeypatch, dialect):
    stand_in(monkeypatch, models, RANK=64)  # wide enough to be quantised
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    write_target(target, "qwen3", seed=1, hidden_size=128, vocab_size=64)
    write_dialect(drafter, target, dialect, seed=2)
    backend, exact = (engine.load(target, drafter, draft_bits=bits) for bits in (8, 16))
    assert engine.quantised_parts(backend)
    found = []
    for own in (backend, exact):
        sequence = SequenceSession(own, drafts=True)
        sequence.extend([*range(12)])
        block = sequence.draft(3)
        previous = np.arange(len(own.drafter.log_probs(block)), dtype=np.int32)
        found.append(own.head.log_probs(block, previous))
    both = np.isfinite(found[0]) & np.isfinite(found[1])
    assert np.corrcoef(found[0][both], found[1][both])[0, 1] > 0.95
    assert_plain_text(backend, budget=16, head_vocab=32)
