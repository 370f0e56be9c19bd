"""The text of an answer in a terminal: Markdown block by block, or lines that wrap at spaces."""

import io
import random
import re
from itertools import pairwise

import pytest
from recordings import recording
from rich.console import Console

from treeflash.cli import answer_view
from treeflash.cli.answer_view import AnswerView, block_starts

TEXT = """# Eggs

To **boil** an egg you need\na pot and \\(x_1 * y_2\\), not <b>luck</b>.

1. Put it into `cold` water.
2. Wait.

```python
print("a  b")

print(1)
```
| a | b |
| - | - |
| 1 | 2 |

The end is [here](http://x.y/z)."""


def show(text: str, size: int = 3, width: int = 60, **settings) -> list[str]:
    """The lines that are shown of a text that comes in pieces, without a terminal."""
    file = io.StringIO()
    with AnswerView(Console(file=file, width=width), **settings) as view:
        for start in range(0, len(text), size):
            view.add(text[start : start + size])
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_addresses_are_not_dropped():
    text = "See [1].\n\n[1]: https://x.y/docs\n\nAn ![egg](http://x.y/egg.png)."
    shown = "\n".join(show(text, markdown=True))
    assert "[1]: https://x.y/docs" in shown
    assert "http://x.y/egg.png" in shown


def test_markdown_is_laid_out():
    lines = show(TEXT, markdown=True)
    text = "\n".join(lines)
    assert "To boil an egg you need\na pot and \\(x_1 * y_2\\), not <b>luck</b>.\n\n" in text
    assert " 1 Put it into cold water." in lines
    assert '\nprint("a  b")\n\nprint(1)\n' in text
    assert "```" not in text
    assert "| a" not in text
    assert lines[-1] == "The end is here (http://x.y/z)."
    assert ("", "") not in pairwise(lines), "one empty line between blocks"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_the_layout_does_not_depend_on_the_pieces(size):
    assert show(TEXT, size, markdown=True) == show(TEXT, 3, markdown=True)


def test_without_markdown_every_character_is_shown():
    assert show(TEXT, markdown=False) == TEXT.splitlines()
    assert show("a\n\nb\n", markdown=False) == ["a", "", "b"]


@pytest.mark.parametrize("markdown", [False, True])
def test_lines_break_at_spaces(markdown):
    words = [random.Random(3).choice(["tree", "forest", "a", "wood"]) for _ in range(200)]
    lines = show(" ".join(words), width=20, markdown=markdown)
    assert " ".join(lines).split() == words
    assert max(map(len, lines)) <= 20
    assert len(lines) < 80


def test_a_terminal_draws_the_last_block_again_and_nothing_else():
    file = io.StringIO()
    console = Console(file=file, width=40, height=5, force_terminal=True, color_system=None)
    text = "First.\n\n" + "\n".join(f"- item {n}" for n in range(9))
    with AnswerView(console, markdown=True) as view:
        view.add("First.\n\n- i")
        before = file.tell()
        view.add(text[len("First.\n\n- i") :])
        drawn = file.getvalue()[before:]
        assert "First." not in drawn
        assert "item 8" in drawn
        assert "item 1" not in drawn, "only the last lines have room"
        before = file.tell()
    assert file.getvalue()[before:].count("item") == 9


def test_code_that_is_still_growing_is_laid_out_as_far_as_there_is_room():
    file = io.StringIO()
    console = Console(file=file, width=40, height=5, force_terminal=True, color_system=None)
    code = "".join(f"line {n}\n" for n in range(30))
    with (
        recording(answer_view, "render_markdown") as calls,
        AnswerView(console, markdown=True) as view,
    ):
        for line in ["```python\n", *code.splitlines(keepends=True)]:
            view.add(line)
        assert calls[-1] == ("```python\nline 26\nline 27\nline 28\nline 29\n",)
        before = file.tell()
    assert re.findall(r"line \d+", file.getvalue()[before:]) == code.splitlines()


@pytest.mark.parametrize("markdown", [False, True])
def test_control_characters_are_shown_and_not_obeyed(markdown):
    lines = show("a\x1b]52;c;eA==\x07b \x9b2J `\x1b[3J`\r\n", markdown=markdown)
    code = "␛[3J" if markdown else "`␛[3J`"
    assert lines == [f"a␛]52;c;eA==␇b \ufffd2J {code}"]


def test_an_error_leaves_the_text_so_far():
    file = io.StringIO()

    def fail(view):
        with view:
            view.add("some text")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(AnswerView(Console(file=file), markdown=True))
    assert file.getvalue() == "some text\n"


@pytest.mark.parametrize(
    ("text", "starts"),
    [("", []), ("a", []), ("a\n\nb\n\nc", [3, 6]), ("a\n---", []), ("a\n- b", [2]),
     ("```\na\n\nb", []), ("- a\n- b\n\n  c\n", []), ("\n\na\n# b\n", [4]),
     ("a\u2028b\n\nc", [5])],
)  # fmt: skip
def test_blocks_begin_where_the_last_one_can_no_longer_change(text, starts):
    assert block_starts(text) == starts
