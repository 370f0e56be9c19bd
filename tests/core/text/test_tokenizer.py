"""Tokenizers, chat templates and incremental detokenising, on tiny tokenizers built here."""

import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import recording
from tiny_tokenizers import CHAT_TEMPLATE, SAMPLE, THINKING_TEMPLATE, byte_level, save_folder
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models
from transformers import AutoTokenizer

from treeflash.errors import CheckpointError, ConfigError, PromptError
from treeflash.testing.pairs import EXAMPLES
from treeflash.text.tokenizer import TRUSTED_TYPES, TextStream, Tokenizer, check_vocabulary


def test_special_tokens_are_left_out_but_can_be_shown(plain):
    start = plain.encode("<|start|>")
    assert len(start) == 1
    assert plain.decode([*start, *plain.encode("a")]) == "a"
    assert plain.token_text(start[0]) == "<|start|>"
    assert plain.token_text(plain.encode("a")[0]) == "a"
    assert "\ufffd" not in plain.token_text(plain.encode("👋")[0])
    assert plain.token_text(100_000) == "<100000>"


def test_a_token_has_the_text_that_it_adds(tokenizer):
    """With the space at its beginning, which some decoders strip from a text of one token."""
    vocabulary = tokenizer.transformers.get_vocab()
    for token in vocabulary.values():
        added = tokenizer.transformers.decode([vocabulary["e"], token]).removeprefix("e")
        if "\ufffd" not in added:
            assert tokenizer.token_text(token) == added
            assert tokenizer.token_bytes(token) == added.encode()


def test_bytes_of_a_character_are_known_one_by_one(tokenizer):
    for text in ("é", "👋"):
        token_ids = tokenizer.encode_continuation(text)
        joined = b"".join(map(tokenizer.token_bytes, token_ids))
        assert joined.removeprefix(b" ") == text.encode()


def test_spaces_before_punctuation_stay(plain):
    assert plain.decode(plain.encode("a , b . n't")) == "a , b . n't"


def test_long_stop_strings_are_not_compared_with_what_is_longer_than_the_text(plain):
    class Stop(str):
        cuts = 0

        def __getitem__(self, key):
            Stop.cuts += 1
            return str.__getitem__(self, key)

    stream = TextStream(plain, [Stop("b" * 1000)])
    assert stream.push(plain.encode("abab")) == "aba"
    assert Stop.cuts < 20


USER = {"role": "user", "content": "hi"}


@pytest.fixture
def chatting(tmp_path):
    """Make a byte-level tokenizer with a chat template."""

    def chatting(template, **settings):
        folder = save_folder(tmp_path, byte_level(), chat_template=template)
        return Tokenizer.from_folder(folder, **settings)

    return chatting


def test_chat_needs_a_template(plain):
    assert not plain.has_chat_template
    with pytest.raises(PromptError, match="use raw for plain text"):
        plain.chat([USER])


def test_chat_ends_in_the_generation_prompt(chatting):
    tokenizer = chatting(CHAT_TEMPLATE)
    assert tokenizer.has_chat_template
    assert not tokenizer.knows_thinking
    expected = tokenizer.encode("<|start|>user: hi<|end|><|start|>assistant")
    assert tokenizer.chat([USER]) == expected


@pytest.mark.parametrize(
    ("settings", "thinking"),
    [({}, False), ({"thinking": True}, True), ({"thinking": False}, False)],
)
def test_thinking_is_off_unless_asked_for(chatting, settings, thinking):
    tokenizer = chatting(THINKING_TEMPLATE, **settings)
    assert tokenizer.knows_thinking
    assert ("<think>" in tokenizer.decode(tokenizer.chat([USER]))) == thinking
    for asked in (False, True):
        text = tokenizer.decode(tokenizer.chat([USER], {"enable_thinking": asked}))
        assert ("<think>" in text) == asked


def chat(tokenizer):
    tokenizer.chat([USER])


FAILED = r"chat.template"
DIVIDES = "{{ 1 / 0 }}"
RESERVED = "'tokenize' is reserved"
HEADERLESS = "puts nothing before the user's message"


@pytest.mark.parametrize(
    ("template", "run", "message"),
    [
        ("{{ raise_exception('no system role') }}", chat, FAILED),
        ("{{ messages[0].content.absent.absent }}", chat, FAILED),
        ("{% if %}", chat, FAILED),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", chat, FAILED),
        (CHAT_TEMPLATE, lambda tokenizer: tokenizer.chat([USER], {"tokenize": False}), RESERVED),
        (DIVIDES, chat, "division by zero"),
        (DIVIDES, Tokenizer.user_header, "division by zero"),
        (DIVIDES, lambda tokenizer: tokenizer.answer("hi"), "division by zero"),
        ("{{ messages[0].content }}", Tokenizer.user_header, HEADERLESS),
        ("nothing", Tokenizer.user_header, HEADERLESS),
    ],
)
def test_template_errors_are_one_line(chatting, template, run, message):
    with pytest.raises(PromptError, match=message) as caught:
        run(chatting(template))
    assert "\n" not in str(caught.value)


def test_text_without_a_token_is_one_line(tmp_path):
    raw = RawTokenizer(models.WordLevel({"known": 0}, unk_token="<absent>"))
    tokenizer = Tokenizer.from_folder(save_folder(tmp_path, raw))
    assert tokenizer.encode("known") == [0]
    with pytest.raises(PromptError, match="the tokenizer cannot encode the text") as caught:
        tokenizer.encode("new")
    assert "\n" not in str(caught.value)


def test_stop_tokens_of_all_three_sources(tmp_path):
    raw = byte_level()
    folder = save_folder(tmp_path, raw)
    end = raw.token_to_id("<|end|>")
    assert Tokenizer.from_folder(folder).stop_token_ids == {end}
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 9}')
    assert Tokenizer.from_folder(folder).stop_token_ids == {end, 7, 8, 9}
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="generation_config"):
        Tokenizer.from_folder(folder)


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path):
    """The library transformers makes one of special tokens alone, which loses the prompt."""
    folder = save_folder(tmp_path, byte_level(), tokenizer_class="TokenizersBackend")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    check_vocabulary(folder)
    (folder / "tokenizer.json").unlink()
    assert AutoTokenizer.from_pretrained(str(folder)).get_vocab()
    for check in (Tokenizer.from_folder, check_vocabulary):
        with pytest.raises(CheckpointError, match=r"no usable tokenizer .*tokenizer\.json"):
            check(folder)


def test_an_end_token_that_only_a_missing_file_has_is_asked_for(tmp_path):
    """Answers would run on, as the end token of the template would end none of them."""
    raw = byte_level()
    folder = save_folder(tmp_path, raw, eos_token="<unk>", chat_template=CHAT_TEMPLATE)
    end = raw.token_to_id("<|end|>")
    with pytest.raises(CheckpointError, match=r"no generation_config\.json.*'<\|end\|>'"):
        Tokenizer.from_folder(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": end}))
    assert end in Tokenizer.from_folder(folder).stop_token_ids
    file.write_text("{}")  # the publisher's own word
    assert end not in Tokenizer.from_folder(folder).stop_token_ids
    file.unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": end}))
    assert end in Tokenizer.from_folder(folder).stop_token_ids


@pytest.mark.parametrize("damage", [None, "", '{"version": "1.0", "mod', '{"model": {}}'])
def test_missing_or_damaged_tokenizer(tmp_path, damage):
    folder = save_folder(tmp_path, byte_level())
    (folder / "tokenizer.json").unlink()
    if damage is not None:
        (folder / "tokenizer.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"no usable tokenizer") as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"config\.json is not JSON"),
        ("[]", r"config\.json is not a JSON object"),
        ('{"model_type": "qwen2", "hidden_size": "x"}', r"config\.json is not usable.*hidden_size"),
        ('{"eos_token_id": "x"}', r"config\.json: eos_token_id must be a token id"),
        ('{"eos_token_id": [[1]]}', r"config\.json: eos_token_id must be a token id"),
    ],
)
def test_a_broken_configuration_is_not_taken_for_a_broken_tokenizer(tmp_path, config, message):
    folder = save_folder(tmp_path, byte_level())
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert "tokenizer.json" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers logs; its logger passes nothing on."""
    logger = logging.getLogger("transformers")
    caplog.set_level(logging.WARNING, logger.name)  # other tests may have asked it to say less
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_a_long_prompt_leaks_no_warning_of_transformers(tmp_path, said):
    folder = save_folder(tmp_path, byte_level(), chat_template=CHAT_TEMPLATE, model_max_length=16)
    tokenizer = Tokenizer.from_folder(folder)
    token_ids = tokenizer.chat([{"role": "user", "content": "word " * 100}])
    assert len(token_ids) > 100
    assert said.messages == []


def test_an_unknown_type_of_model_leaks_no_warning_of_transformers(tmp_path, said):
    """It would stand before the error that names the type."""
    folder = save_folder(tmp_path, byte_level())
    (folder / "config.json").write_text('{"model_type": "foo"}')
    Tokenizer.from_folder(folder)
    logging.getLogger("transformers.configuration_utils").warning("another warning")
    assert said.messages == ["another warning"]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Count the ids of a test tokenizer."""
    return tokenizer.size


def naive(tokenizer: Tokenizer, token_ids: list[int], stop: list[str]) -> tuple[str, bool, int]:
    """Decode everything anew for each token: the text, whether stopped, tokens used."""
    for used in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:used])
        cuts = [text.find(string) for string in stop if string in text]
        if cuts:
            return text[: min(cuts)], True, used
    return tokenizer.decode(token_ids), False, len(token_ids)


repeated = settings(max_examples=EXAMPLES or 50)


@st.composite
def token_sequences(draw: st.DrawFn, size: int) -> list[list[int]]:
    """Draw ids in chunks: random ones, few different ones, and runs of a single one."""
    some = st.integers(0, size - 1)
    few = st.sampled_from(draw(st.lists(some, min_size=1, max_size=4)))
    run = st.builds(lambda token_id, count: [token_id] * count, some, st.integers(1, 40))
    chunk = st.one_of(st.lists(some, max_size=6), st.lists(few, max_size=20), run)
    return draw(st.lists(chunk, max_size=8))


@repeated
@given(data=st.data())
def test_stream_equals_decode_of_all_ids(tokenizer, data):
    chunks = data.draw(token_sequences(vocabulary_size(tokenizer)))
    stream = TextStream(tokenizer)
    pieces = [stream.push(chunk) for chunk in chunks]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    pieces.append(stream.finish())
    token_ids = [token_id for chunk in chunks for token_id in chunk]
    assert "".join(pieces) == tokenizer.decode(token_ids)
    assert stream.tokens_used == len(token_ids)
    assert stream.stopped_by is None


@repeated
@given(data=st.data())
def test_stop_strings_equal_naive_search(tokenizer, data):
    chunks = data.draw(token_sequences(vocabulary_size(tokenizer)))
    token_ids = [token_id for chunk in chunks for token_id in chunk]
    text = tokenizer.decode(token_ids).replace("\ufffd", " ") or "the end"
    begins = st.integers(0, len(text) - 1)
    parts = st.builds(lambda begin, length: text[begin : begin + length], begins, st.integers(1, 6))
    stop = data.draw(st.lists(st.one_of(parts, st.sampled_from(["\n", "the", "eee"])), max_size=3))
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(chunk) for chunk in chunks] + [stream.finish()]
    assert ("".join(pieces), stream.stopped_by is not None, stream.tokens_used) == naive(
        tokenizer, token_ids, stop
    )


def test_possible_stop_string_is_held_back_and_released(plain):
    stream = TextStream(plain, ["END"])
    assert stream.push(plain.encode("the E")) == "the "
    assert stream.push(plain.encode("N")) == ""
    assert stream.push(plain.encode("x")) == "ENx"
    assert stream.push(plain.encode(" E")) == " "
    assert stream.finish() == "E"
    assert stream.stopped_by is None


def test_a_special_token_whose_name_is_a_stop_string_ends_the_text(plain):
    before, special, after = map(plain.encode, ("one <", "<|start|>", "two"))
    stream = TextStream(plain, ["<|start|>"])
    assert stream.push([*before, *special, *after]) == "one <"
    assert stream.stopped_by
    assert stream.tokens_used == len(before) + 1
    assert stream.finish() == ""


def test_window_stays_short(plain):
    stream = TextStream(plain, ["never"])
    with recording(plain, "decode") as windows:
        stream.push(plain.encode(SAMPLE) * 40 + [plain.encode("é")[0]] * 500)
    assert windows
    assert max(len(ids) for (ids,) in windows) < 18, "twice the tokens of a window, and one"


@pytest.mark.parametrize("text", ["𐌰𐌱𐌲𐌳", "𓀀", "ዛa𐌰ሬ"])
def test_window_stays_short_in_characters_of_four_tokens(plain, text):
    token_ids = plain.encode(text * 60)
    stream = TextStream(plain)
    with recording(plain, "decode") as windows:
        shown = "".join(stream.push([token_id]) for token_id in token_ids)
    assert shown + stream.finish() == text * 60
    assert max(len(ids) for (ids,) in windows) < 24, "four characters and two parts, and one token"


def test_empty_stop_string_is_refused(plain):
    with pytest.raises(ConfigError, match="stop string"):
        TextStream(plain, [""])


def test_a_replacement_character_stops_only_where_no_character_is_still_to_come(plain):
    stream = TextStream(plain, ["\ufffd"])
    shown = "".join(stream.push([token_id]) for token_id in plain.encode("a👋b"))
    assert shown + stream.finish() == "a👋b"
    assert stream.stopped_by is None
    broken = plain.encode("👋")[:1]
    stream = TextStream(plain, ["\ufffd"])
    assert stream.push([*plain.encode("a"), *broken, *plain.encode("bc")]) == "a"
    assert stream.stopped_by


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


@pytest.mark.parametrize("model_type", [*TRUSTED_TYPES, "qwen2"])
def test_a_tokenizer_is_of_the_class_that_transformers_chooses(tmp_path, model_type):
    """Where the choice is known, it is not asked for."""
    save_folder(tmp_path, byte_level(), chat_template=CHAT_TEMPLATE)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    found = Tokenizer.from_folder(tmp_path).transformers
    expected = AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(found) is type(expected)
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert found.special_tokens_map == expected.special_tokens_map
    assert found.chat_template == expected.chat_template
