"""What the tests of both backends share."""

import functools
import gc
import importlib
import os
import pickle
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from sampled_cases import choose

from treeflash.testing.pairs import EXAMPLES

# A busy machine takes as long as it likes for an example.
settings.register_profile(
    "all",
    deadline=None,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("all")

# The benchmarks lie beside the tests and are not installed. The package that is comes first.
sys.path.append(str(Path(__file__).parents[1]))

if find_spec("mlx") is not None:
    # Before tests import MLX, which reads its environment once: a GPU would round float32.
    import treeflash_mlx  # noqa: F401

    if os.environ.get("TREEFLASH_TEST_DEVICE") == "cpu":
        import mlx.core as mx

        mx.set_default_device(mx.cpu)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave to the nightly run what is not among the `laws` of a suite, or not in a `sample`."""
    sampled = {}
    for item in items:
        laws = getattr(getattr(item, "cls", None), "laws", None)
        if laws is not None and item.originalname not in laws:
            item.add_marker(pytest.mark.nightly)
        has_cases = hasattr(item, "callspec") and item.get_closest_marker("sample")
        if has_cases and not {"nightly", "device"}.intersection(
            x.name for x in item.iter_markers()
        ):
            sampled.setdefault((item.parent, item.originalname), []).append(item)
    for (_, name), cases in sampled.items():
        mark = cases[0].get_closest_marker("sample")
        count = mark.kwargs.get(name, mark.args[0])
        chosen = choose([item.callspec.id.split("-") for item in cases], count, name)
        for i, item in enumerate(cases):
            if i not in chosen:
                item.add_marker(pytest.mark.nightly)


def pytest_configure():
    """Collect no garbage while tests are collected: hardly anything of it is."""
    gc.disable()


def pytest_collection_finish():
    """Spare the garbage collector the frameworks and the tests, which stay until the end.

    The doctor and other tests collect garbage often, and each time would go through all of them.
    """
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(scope="session")
def kept_folder(request, tmp_path_factory) -> Callable[[str], Path]:
    """Name a folder for compiled code, which all workers share and the next run finds.

    Without pytest's cache it is one of this process: a library must not be loaded from two folders.
    """
    cache = getattr(request.config, "cache", None)
    return cache.mkdir if cache else functools.cache(tmp_path_factory.mktemp)


@pytest.fixture(scope="session", autouse=True)
def own_cache(kept_folder):
    """Keep what tests fetch, convert, compile and measure out of the user's cache.

    The variable may name another cache, which has the default target already.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "TREEFLASH_CACHE" not in os.environ:
            patch.setenv("TREEFLASH_CACHE", str(kept_folder("treeflash")))
        yield


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the default target: fetched and converted once, then from the cache."""
    from treeflash.hub.models import resolve_target

    return resolve_target(None)


@pytest.fixture
def module():
    """Import a module of the benchmarks."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def in_this_process(module, monkeypatch):
    """Run the parts of reports in this process, after they were pickled as for another one."""
    report = module("report")

    def find(part, find, _):
        report.find_here(part, pickle.loads(pickle.dumps(find)))

    monkeypatch.setattr(report, "find_apart", find)
