"""The snippets of docs/python.md run, one after the other."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path

import pytest

import treeflash

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def page(scripted, monkeypatch):
    """Run all snippets, and return the names that they define; fastapi's runs only on request."""
    monkeypatch.setattr(treeflash, "load", lambda: scripted("1, 2, 3, 4, 5, 6, 7, 8, 9, 10."))

    def run(*, web: bool):
        names = {}
        for snippet in SNIPPETS:
            if web or "fastapi" not in snippet:
                code = compile(
                    snippet, PAGE.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
                )
                result = eval(code, names)
                if inspect.iscoroutine(result):
                    asyncio.run(result)
        return names

    return run


def test_the_snippets_run(page, capsys):
    assert len(SNIPPETS) == 9
    names = page(web=False)
    assert repr(names["model"]).startswith("LanguageModel(target=")
    assert [answer.text for answer in names["answers"]] == ["1, 2, 3, 4, 5, 6, 7, 8, 9, 10."] * 3
    shown = capsys.readouterr().out
    assert "interrupted" in shown
    assert shown.count("What is rain?") == 1


def test_the_handler_streams_an_answer(page):
    pytest.importorskip("fastapi")
    from asgi import ask

    answer = ask(page(web=True)["app"], "GET", "/answer?question=hi")
    assert (answer.status, answer.body) == (200, b"1, 2, 3, 4, 5, 6, 7, 8, 9, 10.")


def test_the_handler_refuses_a_prompt_that_is_too_long(page):
    pytest.importorskip("fastapi")
    from asgi import ask

    answer = ask(page(web=True)["app"], "GET", f"/answer?question={'hi' * 50_000}")
    assert answer.status == 400
    assert "tokens" in answer.json()["detail"]
