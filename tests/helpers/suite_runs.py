"""Runs tests of the conformance suite with a backend that may be broken."""

import pytest

MODULE = """
import pytest
from treeflash.testing import BackendSuite

class TestConformance(BackendSuite):
    @pytest.fixture
    def load(self, loader):
        return loader
"""


class Run:
    """A plugin that provides the loader, and notes which tests passed and which failed, how."""

    def __init__(self, loader):
        self.sound_or_broken = loader
        self.passed = set()
        self.failed = {}

    @pytest.fixture
    def loader(self):
        return self.sound_or_broken

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::")[-1].split("[")[0]
        if report.failed:
            self.failed[name] = report.longrepr.reprcrash.message
        elif report.when == "call":
            self.passed.add(name)


def run_suite(folder, loader, *names):
    """Run tests of the suite by name; returns the outcomes."""
    module = folder / "test_generated.py"
    module.write_text(MODULE)
    settings = folder / "pytest.ini"
    options = "-q -p no:cacheprovider --disable-plugin-autoload --import-mode=importlib"
    settings.write_text(f"[pytest]\naddopts = {options}\n")
    run = Run(loader)
    options = ["-c", str(settings), f"--rootdir={folder}", f"--basetemp={folder / 'tmp'}"]
    tests = [f"{module}::TestConformance::{name}" for name in names]
    pytest.main([*options, *tests], plugins=[run])
    return run
