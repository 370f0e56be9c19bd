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


@pytest.mark.parametrize("name", ["a", "", 0])
def test_an_id_in_two_files_is_refused(name):
    with pytest.raises(PromptError, match=f"the id {name!r} is in two files"):
        mix([[Row(id=name, turns=())], [Row(id=name, turns=())]], [1.0, 1.0], None, seed=0)
