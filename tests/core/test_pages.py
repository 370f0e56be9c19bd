"""The snippets of docs/python.md and docs/experiments.md run, one after the other on each page."""

import ast
import asyncio
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest

import treeflash
from treeflash.commands.evaluate import main

PYTHON = Path(__file__).parents[2] / "docs" / "python.md"

PYTHON_SNIPPETS = re.findall(
    r"```python\n(.*?)```", PYTHON.read_text(encoding="utf-8"), flags=re.DOTALL
)


@pytest.fixture
def page(scripted, monkeypatch):
    """Run all snippets, and return the names that they define; fastapi's runs only on request."""
    monkeypatch.setattr(treeflash, "load", lambda: scripted("1, 2, 3, 4, 5, 6, 7, 8, 9, 10."))

    def run(*, web: bool):
        names = {}
        for snippet in PYTHON_SNIPPETS:
            if web or "fastapi" not in snippet:
                code = compile(
                    snippet, PYTHON.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
                )
                result = eval(code, names)
                if inspect.iscoroutine(result):
                    asyncio.run(result)
        return names

    return run


def test_the_snippets_of_python_run(page, capsys):
    assert len(PYTHON_SNIPPETS) == 9
    names = page(web=False)
    assert repr(names["model"]).startswith("LanguageModel(target=")
    assert [answer.text for answer in names["answers"]] == ["1, 2, 3, 4, 5, 6, 7, 8, 9, 10."] * 3
    shown = capsys.readouterr().out
    assert "interrupted" in shown
    assert shown.count("What is rain?") == 1


def test_the_handler_streams_an_answer_and_refuses_a_prompt_that_is_too_long(page):
    pytest.importorskip("fastapi")
    from asgi import ask

    app = page(web=True)["app"]
    answer = ask(app, "GET", "/answer?question=hi")
    assert (answer.status, answer.body) == (200, b"1, 2, 3, 4, 5, 6, 7, 8, 9, 10.")
    answer = ask(app, "GET", f"/answer?question={'hi' * 50_000}")
    assert answer.status == 400
    assert "tokens" in answer.json()["detail"]


PAGE = Path(__file__).parents[2] / "docs" / "experiments.md"

SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)

PROMPTS = '{"prompt": "Why is the sky blue?"}\n{"prompt": "What is snow?"}'


@pytest.fixture
def names(tiny_pair, use, tmp_path, monkeypatch):
    """Run the evaluations whose files are joined, then all snippets; the names they define."""
    pytest.importorskip("matplotlib")
    model = treeflash.load(*tiny_pair, backend="reference")
    monkeypatch.setattr(treeflash, "load", lambda: model)
    monkeypatch.chdir(tmp_path)
    Path("set.jsonl").write_text(PROMPTS)
    use(model)
    options = ["--prompts", "set.jsonl", "--methods", "ddtree,treeflash", "--budgets", "4"]
    for name, temperature in (("greedy", "0"), ("sampled", "1")):
        files = ["--output", f"{name}.json", "--max-tokens", "9", "--temperature", temperature]
        assert main([*options, *files]) == 0
    found: dict[str, object] = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, PAGE.name, "exec", dont_inherit=True), found)
    return found


def test_the_snippets_run(names, capsys):
    assert len(SNIPPETS) == 6
    for path in ("joined.png", "heads.png"):
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    model, fixed, heads = names["model"], names["fixed"], names["heads"]
    plain = model.generate(names["questions"][0], method="ar", max_tokens=48).token_ids
    widths = {}
    for name, head in heads.items():
        model.backend.head = head
        chunks = list(model.stream(names["questions"][0], **fixed))
        assert [token for chunk in chunks for token in chunk.token_ids] == plain
        widths[name] = max(
            np.bincount(chunk.step.tree.depths).max() for chunk in chunks if chunk.step.tree
        )
    assert widths["beams of 2"] == 2 < widths["drafter"]
    lengths = names["lengths"]["drafter"]
    assert sum(sum(own) for own in lengths) / sum(map(len, lengths)) == names["table"]["drafter"][0]
    assert 0 < sum(names["accepted"].values()) <= sum(names["drafted"].values())


# It changes with the page alone, whose snippets run every time.
@pytest.mark.nightly
def test_the_keys_of_the_results_are_described(names):
    page = PAGE.read_text(encoding="utf-8")
    results = json.loads(Path("greedy.json").read_text())
    lists = {key for key, value in results.items() if isinstance(value, list)}
    assert lists == set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
