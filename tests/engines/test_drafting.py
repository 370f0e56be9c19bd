"""Drafters of every engine: what they read, their bits, and texts with them."""

import numpy as np
import pytest
from recordings import recording
from stand_ins import stand_in

from treeflash.config import DecodeConfig
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.testing import models
from treeflash.testing.comparisons import generate, random_tokens
from treeflash.testing.models import write_dialect, write_pair, write_target


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
    for each in (backend, exact):
        sequence = SequenceSession(each, drafts=True)
        sequence.extend([*range(12)])
        block = sequence.draft(3)
        previous = np.arange(len(each.drafter.log_probs(block)), dtype=np.int32)
        found.append(each.head.log_probs(block, previous))
    both = np.isfinite(found[0]) & np.isfinite(found[1])
    assert np.corrcoef(found[0][both], found[1][both])[0, 1] > 0.95
    assert_plain_text(backend, budget=16, head_vocab=32)
