"""The conformance suite: the contract of a backend, as tests to inherit.

It needs the extra `testing` of treeflash and the framework of the backend under test::

    import pytest
    from treeflash.testing import BackendSuite

    class TestConformance(BackendSuite):
        @pytest.fixture
        def load(self):
            from my_backend import load
            return load
"""

from __future__ import annotations

from pkgutil import iter_modules
from typing import ClassVar

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in iter_modules(__path__)))

from treeflash.decoding.interfaces import Backend, Loader
from treeflash.testing.batches import BatchTests, ExactTests, ScheduleTests
from treeflash.testing.checkpoints import (
    CheckpointTests,
    DrafterTests,
    ErrorTests,
    SettingTests,
)
from treeflash.testing.comparisons import Inspectable
from treeflash.testing.generations import DistributionTests, GenerationTests, StopTests
from treeflash.testing.models import (
    DIALECTS,
    FAMILIES,
    HYBRID_FAMILIES,
    write_dialect,
    write_drafter,
    write_target,
)
from treeflash.testing.pairs import Pair, PairMaker, Pairs, require
from treeflash.testing.passes import PassTests, PlainDecodingTests
from treeflash.testing.states import CacheTests, ContextTests, RecurrenceTests, StorageTests
from treeflash.testing.trees import LogProbTests, MaskTests, TransitionTests, TreeTests

__all__ = [
    "DIALECTS",
    "FAMILIES",
    "HYBRID_FAMILIES",
    "BackendSuite",
    "Inspectable",
    "require",
    "write_dialect",
    "write_drafter",
    "write_target",
]

PAIRS = pytest.StashKey[Pairs]()


class BackendSuite(
    TransitionTests,
    LogProbTests,
    TreeTests,
    MaskTests,
    CacheTests,
    RecurrenceTests,
    ContextTests,
    StorageTests,
    PassTests,
    PlainDecodingTests,
    GenerationTests,
    ScheduleTests,
    BatchTests,
    ExactTests,
    StopTests,
    DistributionTests,
    CheckpointTests,
    SettingTests,
    DrafterTests,
    ErrorTests,
):
    """Inherit, name the class `Test...`, and override the fixture `load`.

    The `families` and `hybrids` (families with recurrent layers) are the ones of `FAMILIES` and
    `HYBRID_FAMILIES` that the backend can load as targets; most tests use the first family.
    `dialects` are published formats of drafters, besides plain DFlash and TreeFlash, that it can
    load, out of `DIALECTS`; it must refuse the others. Without `exact_dtypes` it must refuse the
    exact mode. Each of the `mask_nodes` of a tree is run alone too, caches are compared after
    `rounds` of commits, and `write_target` writes the targets: slow backends need less.
    """

    families: ClassVar[tuple[str, ...]] = ("qwen3", "llama", "qwen2", "qwen3_moe", "mistral")
    hybrids: ClassVar[tuple[str, ...]] = ()
    dialects: ClassVar[tuple[str, ...]] = ()
    exact_dtypes: ClassVar[tuple[str, ...]] = ()
    mask_nodes: ClassVar[int] = 24
    rounds: ClassVar[int] = 12
    write_target = staticmethod(write_target)

    @pytest.fixture
    def load(self) -> Loader:
        """Load the backend under test. It is called with `dtype="float32"` and no device."""
        raise NotImplementedError("override the fixture `load` to return the backend's loader")

    @pytest.fixture
    def pair(
        self, load: Loader, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> PairMaker:
        """Make pairs of tiny models; each is written and loaded once for the whole class."""
        suite = request.node.getparent(pytest.Class)
        if PAIRS not in suite.stash:
            suite.stash[PAIRS] = Pairs(tmp_path_factory.mktemp("pairs"), load, self.write_target)
        pairs = suite.stash[PAIRS]
        return lambda family=None, *, target=None, drafter=None: pairs.make(
            family or self.families[0], target, drafter
        )

    @pytest.fixture
    def models(self, pair: PairMaker) -> Pair:
        """Return the pair that most tests use."""
        return pair()

    @pytest.fixture
    def backend(self, models: Pair) -> Backend:
        return models.tested

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run tests with a `family`, `hybrid` or `dialect` for each of them that the backend has.

        Tests with a `plain_family` run for the families that are no hybrids, and tests with a
        `representative` for the first family and for the hybrids.
        """
        suite = metafunc.cls
        assert suite is not None
        for name, values in (
            ("family", suite.families + suite.hybrids),
            ("plain_family", suite.families),
            ("representative", suite.families[:1] + suite.hybrids),
            ("hybrid", suite.hybrids),
            ("dialect", suite.dialects),
            ("exact_dtype", suite.exact_dtypes),
        ):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values)
