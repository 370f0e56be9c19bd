"""A missing framework is a skip with a reason, or an error where that is asked for."""

import pytest

from treeflash.testing import require
from treeflash.testing.pairs import VARIABLE


def test_missing_module_skips(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs no_such_framework"):
        require("no_such_framework")


def test_missing_module_is_an_error_where_all_are_required(monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(ImportError, match="no_such_framework"):
        require("no_such_framework")


def test_module_that_is_there(monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    require("numpy")
