"""Text that is streamed token by token: characters, windows and stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import (
    SAMPLE,
)

from treeflash.errors import ConfigError
from treeflash.text.detokenizer import TextStream
from treeflash.text.tokenizer import Tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Count the ids of a test tokenizer."""
    return len(tokenizer._tokenizer)


def naive(tokenizer: Tokenizer, token_ids: list[int], stop: list[str]) -> tuple[str, bool, int]:
    """Decode everything anew for each token: the text, whether stopped, tokens used."""
    for used in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:used])
        cuts = [text.find(string) for string in stop if string in text]
        if cuts:
            return text[: min(cuts)], True, used
    return tokenizer.decode(token_ids), False, len(token_ids)


@st.composite
def token_sequences(draw: st.DrawFn, size: int) -> list[list[int]]:
    """Draw ids in chunks: random ones, few different ones, and runs of a single one."""
    some = st.integers(0, size - 1)
    few = st.sampled_from(draw(st.lists(some, min_size=1, max_size=4)))
    run = st.builds(lambda token_id, count: [token_id] * count, some, st.integers(1, 40))
    chunk = st.one_of(st.lists(some, max_size=6), st.lists(few, max_size=20), run)
    return draw(st.lists(chunk, max_size=8))


@settings(deadline=None)  # shared machines stall
@given(data=st.data())
def test_stream_equals_decode_of_all_ids(tokenizer: Tokenizer, data: st.DataObject):
    chunks = data.draw(token_sequences(vocabulary_size(tokenizer)))
    stream = TextStream(tokenizer)
    pieces = [stream.push(chunk) for chunk in chunks]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    pieces.append(stream.finish())
    token_ids = [token_id for chunk in chunks for token_id in chunk]
    assert "".join(pieces) == tokenizer.decode(token_ids)
    assert stream.tokens_used == len(token_ids)
    assert not stream.stopped


@settings(deadline=None)  # shared machines stall
@given(data=st.data())
def test_stop_strings_equal_naive_search(tokenizer: Tokenizer, data: st.DataObject):
    chunks = data.draw(token_sequences(vocabulary_size(tokenizer)))
    token_ids = [token_id for chunk in chunks for token_id in chunk]
    text = tokenizer.decode(token_ids).replace("\ufffd", " ") or "the end"
    begins = st.integers(0, len(text) - 1)
    parts = st.builds(lambda begin, length: text[begin : begin + length], begins, st.integers(1, 6))
    stop = data.draw(st.lists(st.one_of(parts, st.sampled_from(["\n", "the", "eee"])), max_size=3))
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(chunk) for chunk in chunks] + [stream.finish()]
    assert ("".join(pieces), stream.stopped, stream.tokens_used) == naive(
        tokenizer, token_ids, stop
    )


def test_every_prefix_is_safe(plain: Tokenizer):
    stream = TextStream(plain)
    shown = ""
    for token_id in plain.encode(SAMPLE):
        shown += stream.push([token_id])
        assert SAMPLE.startswith(shown)
    assert shown + stream.finish() == SAMPLE


def test_possible_stop_string_is_held_back_and_released(plain: Tokenizer):
    stream = TextStream(plain, ["END"])
    assert stream.push(plain.encode("the E")) == "the "
    assert stream.push(plain.encode("N")) == ""
    assert stream.push(plain.encode("x")) == "ENx"
    assert stream.push(plain.encode(" E")) == " "
    assert stream.finish() == "E"
    assert not stream.stopped


def test_stop_cuts_inside_a_chunk_and_ignores_what_follows(plain: Tokenizer):
    before, after = plain.encode("one\n\n"), plain.encode("two")
    stream = TextStream(plain, ["\n\n"])
    assert stream.push(before + after) == "one"
    assert stream.stopped
    assert stream.tokens_used == len(before)
    assert stream.push(after) == stream.finish() == ""
    assert stream.tokens_used == len(before)


def test_earliest_of_two_stop_strings_counts(plain: Tokenizer):
    stream = TextStream(plain, ["cd", "bcd"])
    assert stream.push(plain.encode("abcd")) == "a"


def test_window_stays_short(plain: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    lengths = []
    decode = plain.decode
    monkeypatch.setattr(plain, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    stream = TextStream(plain, ["never"])
    stream.push(plain.encode(SAMPLE) * 40 + [plain.encode("é")[0]] * 500)
    assert max(lengths) < 40


def test_empty_stop_string_is_refused(plain: Tokenizer):
    with pytest.raises(ConfigError, match="stop string"):
        TextStream(plain, [""])


def test_a_replacement_character_stops_only_where_no_character_is_still_to_come(plain: Tokenizer):
    stream = TextStream(plain, ["\ufffd"])
    shown = "".join(stream.push([token_id]) for token_id in plain.encode("a👋b"))
    assert shown + stream.finish() == "a👋b"
    assert not stream.stopped
    broken = plain.encode("👋")[:1]
    stream = TextStream(plain, ["\ufffd"])
    assert stream.push([*plain.encode("a"), *broken, *plain.encode("bc")]) == "a"
    assert stream.stopped


class CapsLock:
    """A decoder with state, as some have: token 0 has no text and toggles upper case."""

    special_token_ids = byte_token_ids = frozenset()

    def decode(self, token_ids):
        text, upper = "", False
        for token_id in token_ids:
            if token_id == 0:
                upper = not upper
            else:
                text += chr(token_id).upper() if upper else chr(token_id)
        return text


@pytest.mark.parametrize(
    "token_ids",
    [
        [0, *map(ord, "abcdefghijklmnopqrstuvwxyz" * 2)],
        # The newest ids alone have the same text for now, but too little to prove anything.
        [*([0] * 9), *map(ord, "12"), *([0] * 6), *map(ord, "abc")],
    ],
)
def test_the_window_forgets_only_ids_that_no_longer_change_the_text(token_ids):
    tokenizer = CapsLock()
    stream = TextStream(tokenizer)
    shown = "".join(stream.push([token_id]) for token_id in token_ids)
    assert shown + stream.finish() == tokenizer.decode(token_ids)
