"""What an iteration costs on a device, counted: graphs, allocations, and operations."""

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Prefill, TableOptions, Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.tree import DraftTree
from treeflash.testing import HYBRID_FAMILIES, require
from treeflash.testing.models import write_pair

require("torch")

from treeflash_cuda import backend as loading
from treeflash_cuda.cache import SCALE_BYTES
from treeflash_cuda.gpu.row_pass import MAX_CHUNK

pytestmark = pytest.mark.sample(1)

VOCAB = 1000
TREE = DraftTree.from_parents(np.arange(6, dtype=np.int32), np.array([-1, 0, 0, 1, 1, 2]))
OPTIONS = TableOptions(m=4, k=8, shortlist=256, rows=16)
MAX_LAUNCHES = {"layer": 9, "commit": 7, "draft": 52, "head": 58}
"""Operations of a layer of the target, of a commit, of a draft, and of a head."""
MAX_HYBRID_LAUNCHES = {
    "qwen3_5": {"layer": 12, "commit": 12, "verify": 143},
    "granitemoehybrid": {"layer": 41, "commit": 12, "verify": 272},
}
"""The layer is one with attention; the targets have four layers, the second one transformers'."""


@pytest.fixture
def launches(module):
    return module("launches")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return write_pair(folder, "qwen3", vocab_size=VOCAB)


@pytest.mark.parametrize("sequences", [8, 32])
def test_all_sequences_lie_in_one_allocation(cuda, pair, sequences):
    cuda.free_bytes = 80 << 30
    backend = loading.load(*pair, LoadConfig(dtype="bfloat16"))
    arenas = backend.target.arena, backend.drafter_arena
    for arena in arenas:
        arena.slab_nbytes = 1 << 16  # the pair is tiny
    states = [backend.open(2000, drafts=True) for _ in range(sequences)]
    backend.verifier.run([Prefill(state, [3, 4, 5], None) for state in states])
    backend.drafter.draft([(state, 1) for state in states])
    assert [len(arena.slabs) for arena in arenas] == [1, 1]


def test_target_and_drafter_share_free_memory_and_leave_a_tenth(cuda, pair):
    """A table for many sampled texts takes gigabytes beside a model of 8 billion weights."""
    backend = loading.load(*pair, LoadConfig(dtype="bfloat16"))
    arenas = backend.target.arena, backend.drafter_arena
    sizes = [arena.reserved_nbytes // arena.column_nbytes for arena in arenas]
    assert abs(sizes[0] - sizes[1]) <= 1
    assert 0.5 < backend.device_report().reserved_bytes / cuda.free_bytes < 0.9


@pytest.mark.parametrize("sequences", [1, 8])
def test_operations_of_an_iteration(cuda, launches, pair, sequences):
    """They do not depend on the number of sequences."""
    backend = loading.load(*pair, LoadConfig(dtype="bfloat16"))
    found, _ = launches.count_operations(cuda, backend, sequences)
    for part, limit in MAX_LAUNCHES.items():
        assert 0 < found[part].operations <= limit, found
    assert {part: cost.syncs for part, cost in found.items() if cost.syncs} == {
        "verify": 1,
        "head": 1,
    }


# The other tests count with the same functions.
@pytest.mark.nightly
def test_the_command_counts_operations_and_bytes(cuda, launches):
    """The bytes of a pass are at least the weights' bytes, and grow with the context."""
    backend, found = launches.load_without_weights(launches.SHAPES["tiny"], "treeflash"), []
    for settings in ("--sequences 1,8 --context 16", "--sequences 8 --context 64"):
        args = launches.parser().parse_args(["--nodes", "8", *settings.split()])
        rows = launches.rows(cuda, backend, args)
        found.append({(row["sequences"], row["part"]): row for row in rows})
    one, eight = (found[0][n, "iteration"] for n in (1, 8))
    assert eight["operations"] < one["operations"] + 10
    assert one["slabs"] == eight["slabs"] == 2
    weights = 2 * (4 * 64 * (64 * 4 + 3 * 128) + 64 * 2048)
    for part in ("verify", "layer"):
        sizes = [rows[8, part]["megabytes"] for rows in found]
        assert sizes[0] < sizes[1], part
        assert found[0][1, part]["megabytes"] < sizes[0], part
    assert found[0][1, "verify"]["megabytes"] > weights / 1e6
    assert 4 <= launches.count_graphs(backend, 40) <= 20


# Three seconds; `test_hybrid_trees.py` shows that sequences run together.
@pytest.mark.nightly
@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_operations_of_a_hybrid_target(cuda, launches, tmp_path, family, sequences):
    """They hardly depend on the number of sequences."""
    backend = loading.load(
        *write_pair(tmp_path, family, vocab_size=VOCAB), LoadConfig(dtype="bfloat16")
    )
    found, _ = launches.count_operations(cuda, backend, sequences)
    for part, limit in MAX_HYBRID_LAUNCHES[family].items():
        assert 0 < found[part].operations <= limit, found


# Three seconds, for speed alone.
@pytest.mark.nightly
@pytest.mark.parametrize("window", [None, 100])
def test_keys_in_8_bits_are_converted_for_long_prompts_alone(cuda, tmp_path, window):
    """Short prompts, trees, drafts and commits read and write the 8 bits as they are."""
    family, settings = ("mistral", {"sliding_window": window}) if window else ("qwen3", {})
    backend = loading.load(
        *write_pair(tmp_path, family, vocab_size=VOCAB, **settings),
        LoadConfig(dtype="bfloat16", kv_bits=8),
    )
    state = backend.open(2000, drafts=True)
    shape = np.array(backend.target.arena.like.shape)
    column = 2 * len(backend.target.layers) * shape[1] * (shape[3] - SCALE_BYTES)
    for tokens in (700, 300, MAX_CHUNK, 1):
        before, first = cuda.converted, state.length
        backend.verifier.run([Prefill(state, [3] * tokens, None)])
        seen = state.length - (max(first + 1 - window, 0) if window else 0)
        assert cuda.converted - before == (seen * column if tokens > MAX_CHUNK else 0)
    before = cuda.converted
    backend.drafter.draft([(state, 1)])
    verified = backend.verifier.run([Verify(state, TREE, SamplingParams())])
    backend.verifier.commit(verified, [(state, np.array([0, 2], np.int32))])
    assert cuda.converted == before
