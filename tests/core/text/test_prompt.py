"""Rows of a prompt file, and messages in the places where chat templates show them."""

import pytest
from tiny_tokenizers import byte_level, save_folder

from treeflash.errors import PromptError
from treeflash.text.prompt import Prompting, encode, read_rows
from treeflash.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "the line is not JSON: Expecting property name"),
        ("A plain line.", "the line is not JSON: Expecting value"),
        ("[1]", "must be a JSON object"),
        # Python says the second from 3.14 on.
        ("[" * 100000, "the line is not JSON: .*(recursion|Stack overflow)"),
        ('{"id": null, "prompt": "x"}', "'id' must be a string or an integer"),
        ('{"id": true, "prompt": "x"}', "'id' must be a string or an integer"),
        ('{"id": 1}', "exactly one of"),
        ('{"id": 1, "prompt": "x", "turns": ["x"]}', "exactly one of"),
        ('{"id": 1, "prompt": 3}', "'prompt' must be a string"),
        ('{"id": 1, "turns": []}', "'turns' must be a non-empty list of strings"),
        ('{"id": 1, "turns": "x"}', "'turns' must be a non-empty list of strings"),
        ('{"id": "\\ud800", "prompt": "x"}', "not valid Unicode"),
        ('{"id": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', "not valid Unicode"),
        ('{"id": 1, "prompt": "\\ud800"}', "not valid Unicode"),
        ('{"id": 1, "messages": []}', "'messages' must be a non-empty list"),
        ('{"id": 1, "messages": [{"role": "user"}]}', "message 1 needs"),
        ('{"id": "first", "prompt": "x"}', "'first' is already used on line 1"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "first", "prompt": "x"}\n\n' + line + "\n")
    with pytest.raises(PromptError, match=message) as raised:
        read_rows(path)
    assert str(raised.value).startswith(f"{path}:3: ")


def test_rows_without_an_id_have_the_number_of_their_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n\n{"prompt": "y"}\n{"id": "z", "prompt": "z"}\n')
    assert [row.id for row in read_rows(file)] == [1, 3, "z"]
    file.write_text('{"prompt": "x"}\n{"id": 1, "prompt": "y"}\n')
    with pytest.raises(PromptError, match="the id 1 is already used on line 1"):
        read_rows(file)


def test_a_tokenizer_without_a_chat_template_has_one_way_of_prompting(plain):
    assert Prompting(raw=True).alternatives(plain) == []


def test_the_content_of_a_message_may_be_parts(byte_tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    joined = encode(byte_tokenizer, [{"role": "user", "content": parts}])
    assert joined == encode(byte_tokenizer, [{"role": "user", "content": "ab"}])
    for content in ([{"type": "image_url", "image_url": {}}], ["a"]):
        with pytest.raises(PromptError, match="only texts are supported"):
            encode(byte_tokenizer, [{"role": "user", "content": content}])


SHOWS = "{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}"
LATER = "m.role == 'system' and not loop.first"
AGAIN = "not loop.first and m.role == loop.previtem.role"
REJECTS, ALTERNATES = (
    SHOWS.replace("{{", "{% if " + case + " %}{{ raise_exception('no') }}{% endif %}{{", 1)
    for case in (LATER, f"{LATER} or {AGAIN}")
)
DROPS = SHOWS.replace("{{", "{% if not (" + LATER + ") %}{{", 1).replace(
    "{% end", "{% endif %}{% end"
)
MANY = [
    *(("system", "a"), ("system", "b"), ("user", "c"), ("system", "d"), ("user", "e")),
    *(("assistant", "f"), ("system", "g"), ("system", "h"), ("assistant", "i"), ("user", "j")),
]
JOINED = [
    *(("system", "a\n\nb"), ("user", "c\n\nd\n\ne")),
    *(("assistant", "f"), ("user", "g\n\nh"), ("assistant", "i"), ("user", "j")),
]
AGENT = [("user", "a"), ("system", "b")]  # the first request of a coding agent


def by_role(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize(
    ("template", "given", "shown"),
    [
        (SHOWS, MANY, MANY),
        (REJECTS, MANY, JOINED),
        (DROPS, MANY, JOINED),
        (ALTERNATES, MANY, JOINED),
        (REJECTS, AGENT, [("user", "a\n\nb")]),
        (REJECTS, [("system", "a"), ("user", "b"), ("user", "c")], None),
        (REJECTS, [*AGENT, ("user", "c"), ("user", "d")], [("user", "a\n\nb\n\nc\n\nd")]),
    ],
    ids=["shows", "rejects", "drops", "alternates", "agent", "one", "users"],
)
def test_every_system_message_reaches_the_model(tmp_path, template, given, shown):
    folder = save_folder(tmp_path, byte_level(), chat_template=template)
    tokenizer = Tokenizer.from_folder(folder)
    expected = "".join(f"{role}: {content}. " for role, content in shown or given)
    assert encode(tokenizer, by_role(given)).text == expected
