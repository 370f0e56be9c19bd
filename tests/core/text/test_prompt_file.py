"""Rows of a prompt file."""

from __future__ import annotations

import pytest

from treeflash.errors import PromptError
from treeflash.text.prompt_file import read_rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "must be a JSON object with an id"),
        ("[" * 100000, "recursion"),
        ('{"prompt": "x"}', "needs an 'id'"),
        ('{"id": null, "prompt": "x"}', "needs an 'id'"),
        ('{"id": true, "prompt": "x"}', "needs an 'id'"),
        ('{"id": 1}', "exactly one of"),
        ('{"id": 1, "prompt": "x", "turns": ["x"]}', "exactly one of"),
        ('{"id": 1, "prompt": 3}', "'prompt' must be a string"),
        ('{"id": 1, "turns": []}', "'turns' must be a non-empty list of strings"),
        ('{"id": 1, "turns": "x"}', "'turns' must be a non-empty list of strings"),
        ('{"id": "\\ud800", "prompt": "x"}', "not valid Unicode"),
        (
            '{"id": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
            "not valid Unicode",
        ),
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
