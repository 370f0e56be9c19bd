"""P-EAGLE on random pairs: equality of backends, of rows after earlier drafts, and of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mtp_pairs import write_peagle_pair
from published_drafters import BACKENDS, FLOAT32, TOLERANCE
from scheduled_texts import assert_plain_texts

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.session import SequenceSession
from treeflash.errors import CheckpointError, ConfigError
from treeflash.registry import loader
from treeflash.testing.models import edit_config
from treeflash.testing.states import check_storage

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [1, 1, 2, 3, 5, 8, 13, 21, 12, 11, 10, 9])


def load_pair(backend: str, folder: Path) -> Any:
    pytest.importorskip(BACKENDS[backend])
    return loader(backend)(*write_peagle_pair(folder), FLOAT32)


@pytest.mark.parametrize("backend", ["cuda", "mlx"])
def test_tables_of_several_sequences_equal_the_reference(backend: str, tmp_path: Path) -> None:
    def tables(pair: Any) -> list[Any]:
        sequences = [SequenceSession(pair, drafts=True) for _ in PROMPTS]
        for sequence, prompt in zip(sequences, PROMPTS, strict=True):
            sequence.extend(prompt)
        made = []
        for root in (4, 6):  # the second after different new tokens
            blocks = pair.drafter.draft([(s.state, root) for s in sequences], 4)
            made += pair.drafter.marginals(blocks, TableOptions(k=4))
            for n, sequence in enumerate(sequences, 1):
                sequence.extend([root, *range(n)])
        return made

    pairs = load_pair(backend, tmp_path), load_pair("reference", tmp_path)
    for actual, expected in zip(*map(tables, pairs), strict=True):
        assert actual.depths == 4
        np.testing.assert_array_equal(actual.tokens, expected.tokens)
        np.testing.assert_allclose(actual.log_probs, expected.log_probs, atol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_earlier_drafts(backend: str, tmp_path: Path) -> None:
    """Rows of accepted drafts come from the target's states, also after forks and truncations."""
    pair = load_pair(backend, tmp_path)
    tokens = list(PROMPTS[2])
    with SequenceSession(pair, drafts=True) as old:
        for stop in (3, 5, 6):
            old.extend(tokens[old.length : stop])
            old.draft(tokens[stop])
        fork = old.state.fork(5, 64)
        old.extend(tokens[6:])
        old.draft(2)
        old.state.truncate(4)
        for state, length in ((fork, 5), (old.state, 4)):
            session = SequenceSession(pair, drafts=True)
            session.state = state
            session.extend([7, 3])
            with SequenceSession(pair, drafts=True) as fresh:
                fresh.extend([*tokens[:length], 7, 3])
                actual, expected = (pair.drafter.log_probs(x.draft(9)) for x in (session, fresh))
                np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


@pytest.mark.sample(2)
@pytest.mark.parametrize("read", [11, 0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stored_states_continue_bit_for_bit(backend: str, read: int, tmp_path: Path) -> None:
    check_storage(load_pair(backend, tmp_path), read=read)


@pytest.mark.sample(2)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_equal_plain_decoding(backend: str, temperature: float, tmp_path: Path) -> None:
    pair, drafting = load_pair(backend, tmp_path), (("ddtree", 12), ("dflash", 6))
    assert_plain_texts(pair, PROMPTS, *drafting, temperature=temperature, max_tokens=12)


@pytest.mark.parametrize("backend", ["cuda", "mlx"])
def test_long_prompts_run_in_chunks(backend: str, tmp_path: Path) -> None:
    pair = load_pair(backend, tmp_path)

    def drafted() -> Any:
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend(PROMPTS[2])
            return pair.drafter.log_probs(sequence.draft(3))

    expected = drafted()
    pair.drafter.chunk = 4
    np.testing.assert_allclose(drafted(), expected, atol=TOLERANCE)


def test_what_is_refused(tmp_path: Path) -> None:
    target, head = write_peagle_pair(tmp_path)
    config = LoadConfig(device="cpu", dtype="float32", draft_window=64)
    with pytest.raises(ConfigError, match="draft_window is not supported"):
        loader("reference")(target, head, config)
    edit_config(head, lambda c: c.update(mask_token_id=24))
    with pytest.raises(CheckpointError, match="its mask token 24 is outside the vocabulary of 24"):
        loader("reference")(target, head, FLOAT32)
