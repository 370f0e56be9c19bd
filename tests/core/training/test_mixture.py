"""Prompts of several files in one shuffled list."""

import pytest

from treeflash.errors import PromptError
from treeflash.text.prompt import Row
from treeflash.training.distillation import mix


def test_weights_share_the_limit_out():
    files = [[Row(id=f"{name}{n}", turns=()) for n in range(1000)] for name in ("a", "b")]
    chosen = mix(files, [3.0, 1.0], 400, seed=0)
    share = sum(str(row.id).startswith("a") for row in chosen) / 400
    assert 0.68 < share < 0.82
    assert chosen == mix(files, [3.0, 1.0], 400, seed=0)
    assert chosen != mix(files, [3.0, 1.0], 400, seed=1)


def test_without_limit_every_row_comes_once():
    files = [[Row(id="a", turns=())], [Row(id="b", turns=()), Row(id="c", turns=())]]
    assert {row.id for row in mix(files, [9.0, 1.0], None, seed=0)} == {"a", "b", "c"}


def test_an_id_in_two_files_is_refused():
    with pytest.raises(PromptError, match="the id 'a' is in two files"):
        mix([[Row(id="a", turns=())], [Row(id="a", turns=())]], [1.0, 1.0], None, seed=0)
