"""The text of an answer in a terminal, while it is generated.

A terminal cannot change what has scrolled away, and Markdown may: a line becomes a heading when the
next one is `---`. So the last block (a paragraph, a list, a piece of code) is drawn again with each
chunk, and a block is printed for good when the next one begins:

    printed    To boil an egg:
               (empty line)
    drawn      1. Put the egg into **cold wa

Without Markdown the blocks are lines. Both wrap at spaces.
"""

from __future__ import annotations

import re
from typing import ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import CodeBlock, Markdown
from rich.segment import Segment, SegmentLines
from rich.syntax import Syntax
from rich.text import Text

# Models write HTML as text, formulas with backslashes, and the addresses of sources and images, all
# of which Markdown would drop.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
PARSER.disable(["escape", "image", "reference"])
FENCE = re.compile(r"\s*(```|~~~).*\n")
PICTURES = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"},
    **dict.fromkeys(range(127, 160), 0xFFFD),
}
"""A visible character for each control character, which a terminal would obey: one that a model
writes could set the title of the window, or what the clipboard holds."""


class Code(CodeBlock):
    """Code that begins in the first column, so that it can be copied from the terminal."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = str(self.text).rstrip()
        yield Syntax(text, self.lexer_name, theme=self.theme, word_wrap=True)


class TerminalMarkdown(Markdown):
    """Markdown with such code."""

    elements: ClassVar = {**Markdown.elements, "fence": Code, "code_block": Code}


def render_markdown(text: str) -> Markdown:
    """Lay out Markdown, with the line breaks of the text."""
    markdown = TerminalMarkdown("", justify="default", hyperlinks=False)
    markdown.parsed = PARSER.parse(text)
    for token in markdown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return markdown


def line_starts(text: str) -> list[int]:
    """Return the indices at which the lines of a text begin, but for the first."""
    return [index + 1 for index, character in enumerate(text) if character == "\n"]


def block_starts(text: str) -> list[int]:
    """Return the indices at which the blocks of a Markdown text begin, but for the first."""
    lines = [0, *line_starts(text)]
    starts = [token.map[0] for token in PARSER.parse(text) if token.level == 0 and token.map]
    return [lines[start] for start in starts[1:]]


class AnswerView:
    """Shows one answer inside a `with` block."""

    def __init__(self, console: Console, *, markdown: bool) -> None:
        self._console, self._markdown = console, markdown
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._block = Text()  # the last one
        self._has_printed = False

    def __enter__(self) -> AnswerView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Print the last block."""
        self._live.update(Text(), refresh=True)
        if self._block.plain.strip():
            self._print(self._block)
        self._live.stop()

    def report(self, progress: str) -> None:
        """Show how far the answer is, until its first text."""
        self._live.update(Text(progress, "dim"), refresh=True)

    def add(self, text: str, style: str = "") -> None:
        """Add text to the answer; the style counts without Markdown only."""
        self._block.append(text.translate(PICTURES), style)
        plain = self._block.plain
        starts = block_starts(plain) if self._markdown else line_starts(plain)
        *complete, self._block = self._block.divide(starts)
        if complete:
            self._live.update(Text(), refresh=True)
        for block in complete:
            self._print(block)
        room = max(self._console.height - 1, 1)
        last_lines = self._lines(self._end(room))[-room:]
        self._live.update(SegmentLines(last_lines, new_lines=True), refresh=True)

    def _end(self, room: int) -> Text:
        """Return the last block, of code only the lines that have room: to colour it is slow."""
        fence = FENCE.match(self._block.plain) if self._markdown else None
        if fence is None:
            return self._block
        code = self._block.plain[fence.end() :].splitlines(keepends=True)
        return Text(fence.group() + "".join(code[-room:]))

    def _print(self, block: Text) -> None:
        self._console.print(SegmentLines(self._lines(block), new_lines=True), end="")
        self._has_printed = True

    def _lines(self, block: Text) -> list[list[Segment]]:
        """Wrap a block to the width of the terminal, after an empty line if it is not the first."""
        if not self._markdown:
            line = block[:-1] if block.plain.endswith("\n") else block
            return self._console.render_lines(line, pad=False)
        lines = self._console.render_lines(render_markdown(block.plain), pad=False)
        # Some blocks have empty lines around them, others have not.
        while lines and _is_empty(lines[0]):
            del lines[0]
        while lines and _is_empty(lines[-1]):
            del lines[-1]
        return [[], *lines] if self._has_printed else lines


def _is_empty(line: list[Segment]) -> bool:
    return not "".join(segment.text for segment in line).strip()
