"""Drawings of draft trees, and the progress of a prompt."""

from __future__ import annotations

import io
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from treeflash.cli.single_prompt import SHOWN_NODES, explain, run_text
from treeflash.decoding.loop import Step
from treeflash.decoding.tree import DraftTree


@pytest.fixture
def draw(byte_tokenizer):
    """Draw a tree given by its letters, parents and probabilities, as plain lines."""

    def draw(letters, parents, probs, path, bonus="z") -> list[str]:
        ids = [byte_tokenizer.encode(letter)[0] for letter in letters]
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        tree = DraftTree(
            np.array(ids, np.int32),
            np.array(parents, np.int32),
            np.array(depths, np.int32),
            np.log(np.array(probs, np.float64)),
        )
        tokens = [ids[node] for node in path[1:]]
        if bonus:
            tokens += byte_tokenizer.encode(bonus)
        step = Step(tuple(tokens), {}, tree, np.array(path, np.int32))
        file = io.StringIO()
        Console(file=file, width=200).print(explain(step, 3, byte_tokenizer))
        return file.getvalue().splitlines()

    return draw


def test_tokens_probabilities_path_and_bonus(draw):
    assert [line.rstrip() for line in draw("rab[", [-1, 0, 0, 1], [1, 0.5, 0.3, 0.2], [0, 1])] == [
        "iteration 3: 4 nodes, 1 accepted + bonus",
        "└── ✓ 'r'  root: the last token so far",
        "    ├── ✓ 'a'  50.0%",
        "    │   ├──   '['  20.0% (40.0% after its parent)",
        "    │   └── ✓ 'z'  bonus: the target's own choice",
        "    └──   'b'  30.0%",
    ]


def test_a_root_alone(draw):
    assert draw("r", [-1], [1], [0])[0] == "iteration 3: 1 node, 0 accepted + bonus"


def test_a_large_tree_keeps_the_most_probable_nodes_and_the_accepted_path(draw):
    n = 60
    probs = [1.0, *np.linspace(0.9, 0.02, n - 2), 0.01]
    lines = draw(
        "r" + "a" * (n - 2) + "q", [-1] + [0] * (n - 2) + [n - 2], probs, [0, n - 2, n - 1]
    )
    text = "\n".join(lines)
    shown = SHOWN_NODES + 2
    assert f"60 nodes, 2 accepted + bonus ({n - shown} less probable nodes not shown)" in lines[0]
    assert len(lines) == 1 + shown + 1
    assert "✓ 'q'  1.0% (50.0% after its parent)" in text


def test_no_bonus_if_the_text_ended_on_the_path(draw):
    lines = draw("rab", [-1, 0, 1], [1, 0.5, 0.4], [0, 1, 2], bonus="")
    assert lines[-1].strip() == "└── (the text ended on this path)"


def test_square_brackets_are_not_markup(draw):
    assert "'['" in "".join(draw("r[", [-1, 0], [1, 0.5], [0]))


class RecordedConsole(Console):
    """A console that keeps what its status says."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO())
        self.said: list[str] = []

    @contextmanager
    def status(self, text: str):
        self.said.append(text)
        yield SimpleNamespace(update=self.said.append)


@pytest.mark.parametrize(("length", "said"), [(512, []), (2500, [0, 2048])])
def test_a_status_says_how_much_of_a_long_prompt_has_run(scripted, capsys, length, said):
    model, console = scripted("An answer."), RecordedConsole()
    model.backend.max_positions = 4000
    stream = model.stream([1] * length, max_tokens=100)
    assert run_text(stream, {}, console, as_json=False, compared=False, explained=0) == 0
    assert capsys.readouterr().out == "An answer.\n"
    assert console.said == [f"reading the prompt: {done:,} of 2,500 tokens" for done in said]
