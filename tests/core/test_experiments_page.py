"""The snippets of docs/experiments.md run, one after the other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import treeflash
from treeflash.commands.evaluate import main

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
