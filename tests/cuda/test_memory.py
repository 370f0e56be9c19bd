"""Memory of the arenas over many texts, and what pairs on one GPU leave each other."""

from dataclasses import replace

import accelerators
import numpy as np
import pytest
from failures import failing
from memory import check_memory
from parts import load_with_parts

from treeflash.config import GIB, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.decoding.interfaces import Prefill
from treeflash.decoding.sampling import Noise, SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.errors import ConfigError
from treeflash.testing import require
from treeflash.testing.models import write_pair

require("torch")

import torch
from fake_cuda import DEVICE
from treeflash_cuda import memory
from treeflash_cuda.backend import load
from treeflash_cuda.cache import KVCache
from treeflash_cuda.memory import FREE_MEMORY_SHARE, MEASURED_TEXTS, TABLE
from treeflash_cuda.state import State
from treeflash_cuda.visible_keys import PAGE


@pytest.mark.sample(1)
@pytest.mark.parametrize("static", [False, True], ids=["", "static shapes"])
def test_no_state_stays_open_over_many_texts(monkeypatch, folders, static):
    if static:
        backend = load_with_parts(monkeypatch, *folders)
    else:
        backend = load(*folders, LoadConfig(device="cpu"))
    arenas = backend.target.arena, backend.drafter_arena
    for arena in arenas:
        arena.slab_nbytes = 1 << 16  # several of them

    def held():
        return sum(slab.storage.nbytes for arena in arenas for slab in arena.slabs)

    check_memory(monkeypatch, backend, State, held)
    for arena in arenas:
        assert [slab.is_free for slab in arena.slabs] == [True]


def test_a_fork_on_a_gpu_copies_nothing(cuda, folders):
    """Nor does a state that the prefix cache keeps."""
    backend = load(*folders, LoadConfig(dtype="float32"))
    state = backend.open(300, drafts=True)
    backend.verifier.run([Prefill(state, [3] * 200, None)])
    backend.drafter.draft([(state, 1)])
    before = len(cuda.launches), cuda.nbytes, cuda.allocated[DEVICE]
    forks = [state.fork(199, 250) for _ in range(3)] + [state.fork(200, 200)]
    assert (len(cuda.launches), cuda.nbytes, cuda.allocated[DEVICE]) == before
    assert [fork.length for fork in forks] == [199] * 3 + [200]
    assert len({tuple(fork.kv_cache.pages[:4]) for fork in (state, *forks)}) == 1


def test_answers_to_one_prompt_run_at_once_where_two_prompts_would_fit(monkeypatch, folders):
    """On a GPU they share the pages of their prompt."""
    backend = load_with_parts(monkeypatch, *folders)
    prompt = [3 + n % 30 for n in range(3 * PAGE + 1)]
    requests = [
        Request(prompt_ids=prompt, config=DecodeConfig(method="ar", max_tokens=3)) for _ in range(5)
    ]
    alone = backend.state_nbytes(len(prompt) + 3, drafts=False)
    config = SchedulerConfig(max_bytes=5 * alone // 2)
    scheduler, running, tokens = Scheduler(backend, config), [], {}
    scheduler.submit_group(requests)
    while scheduler.busy:
        for request, step in scheduler.step():
            tokens.setdefault(request, []).extend(step.tokens)
        running.append(scheduler.running)
        assert scheduler.nbytes <= config.max_bytes
    assert max(running) == len(requests)
    assert list(tokens.values()) == [tokens[requests[0]]] * len(requests)
    assert backend.target.arena.slabs[0].is_free


def test_answers_to_a_prompt_that_fills_its_pages_share_them_all(monkeypatch, folders):
    """Each runs the prompt's last token again. Another token there gets a page of its own."""
    backend = load_with_parts(monkeypatch, *folders)
    prompt, answer = [3 + n % 30 for n in range(2 * PAGE)], [5, 6, 7]

    def run(state, tokens):
        (sampled,) = backend.verifier.run([Prefill(state, tokens, SamplingParams())]).sampled
        return sampled.tokens.tolist()

    first = backend.open(3 * PAGE, drafts=False)
    expected = run(first, prompt)
    keys = first.read_kv_cache()
    forks = [first.fork(len(prompt) - 1, 3 * PAGE) for _ in range(3)]
    for fork in forks[:2]:
        assert run(fork, prompt[-1:]) == expected
        assert fork.kv_cache.pages[:2].tolist() == first.kv_cache.pages[:2].tolist()
    run(forks[2], [prompt[-1] - 1])
    assert forks[2].kv_cache.pages[1] != first.kv_cache.pages[1]
    assert (backend.target.arena.slabs[0].owners > 0).sum() == 3 + 3 + 1
    np.testing.assert_array_equal(first.read_kv_cache(), keys)
    expected = run(first, answer)
    assert [run(fork, answer) for fork in forks[:2]] == [expected] * 2
    for fork in forks[:2]:
        np.testing.assert_allclose(fork.read_kv_cache(), first.read_kv_cache(), atol=1e-5)


def test_a_fork_that_fails_in_the_middle_gives_its_regions_back(folders):
    backend = load(*folders, LoadConfig(device="cpu"))
    session = SequenceSession(backend, drafts=True)
    session.extend([3, 4, 5])
    session.draft(6)
    with failing(KVCache, "copy_from", MemoryError, call=2), pytest.raises(MemoryError):
        session.state.fork(2, 10)
    session.close()
    for arena in (backend.target.arena, backend.drafter_arena):
        assert [slab.is_free for slab in arena.slabs] == [True]


# Only new pairs of the device suite can change it.
@pytest.mark.nightly
def test_the_pairs_of_the_device_suite_fit_one_gpu(cuda, folders, monkeypatch):
    """The suite keeps all pairs of a class, and pytest keeps a class until the end.

    Others may have most of the card, of which a load would warn.
    """
    monkeypatch.setattr(accelerators, "need_cuda", lambda: DEVICE)
    cuda.free_bytes, states = 15 * GIB, []
    held = torch.empty(10 * GIB, dtype=torch.uint8, device=DEVICE)
    for _ in range(4):
        pair = accelerators.load_cuda(*folders, LoadConfig(dtype="float32"))
        states.append(pair.open(64, drafts=True))
    assert (cuda.allocated[DEVICE] - held.nbytes) / len(states) < cuda.free_bytes / 100


# The other tests set memory aside by the same function.
@pytest.mark.nightly
def test_a_pair_that_finds_half_of_a_gpu_taken_says_so(cuda, folders):
    cuda.free_bytes = 10 * GIB
    held = torch.empty(6 * GIB, dtype=torch.uint8, device=DEVICE)
    with pytest.warns(
        UserWarning, match=r"^only 4\.0 of 10\.0 GiB of cuda:0 are free: .* memory_gb$"
    ):
        backend = load(*folders, LoadConfig(dtype="float32"))
    reserved = backend.device_report().reserved_bytes
    assert reserved == pytest.approx(4 * FREE_MEMORY_SHARE * GIB, rel=0.05)
    del held
    backend = load(*folders, LoadConfig(dtype="float32"))
    assert backend.device_report().reserved_bytes > 8 * GIB


def test_memory_is_set_aside_as_asked(cuda, folders):
    cuda.free_bytes = 10 * GIB
    backend = load(*folders, LoadConfig(dtype="float32", memory_gb=1.5))
    assert backend.device_report().reserved_bytes == pytest.approx(1.5 * GIB, abs=2)
    with pytest.raises(
        ConfigError, match=r"^memory_gb is 10, but the models leave 9\.\d+ GiB free"
    ):
        load(*folders, LoadConfig(dtype="float32", memory_gb=10))


def test_a_processor_sets_no_memory_aside(folders):
    with pytest.raises(ConfigError, match="sets no memory aside on a CPU; remove memory_gb"):
        load(*folders, LoadConfig(device="cpu", memory_gb=1))


def test_tables_of_many_sampled_texts_have_memory_beside_what_is_set_aside(
    cuda, tmp_path, monkeypatch
):
    """As on a GPU of 24 GB, where they need more than a pass of the target."""
    monkeypatch.setattr(memory, "MAX_ROWS", 8)
    folders = write_pair(tmp_path, "qwen3", vocab_size=30_000)
    cuda.free_bytes = 150 << 20
    backend = load(*folders, LoadConfig(dtype="float32"))
    states = [backend.open(40, drafts=True) for _ in range(MEASURED_TEXTS)]
    backend.verifier.run([Prefill(state, [3, 4], None) for state in states])
    blocks = backend.drafter.draft([(state, 5) for state in states])
    after = np.arange(1, len(blocks[0].hidden) + 1, dtype=np.int32)
    noise = Noise.from_positions([(SamplingConfig(temperature=1.0), after)] * len(states))
    backend.head.transitions(blocks, replace(TABLE, noise=noise))
    assert backend.target.graphs.captured["the AR head"] == 1
