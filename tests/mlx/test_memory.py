"""Memory of the MLX backend over many sequences."""

import numpy as np
import pytest
from failures import failing
from memory import check_memory

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.decoding.interfaces import Verify
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError, MemoryInUseError, MemoryShortError
from treeflash.testing import require
from treeflash.testing.models import write_pair, write_target

require("mlx_lm")

import mlx.core as mx
from treeflash_mlx.backend import load
from treeflash_mlx.cache import BatchStorage, KVCache, share_storage
from treeflash_mlx.device import refuse_size
from treeflash_mlx.memory import MEMORY
from treeflash_mlx.state import State


def test_no_state_stays_open_over_many_sequences(monkeypatch, tmp_path):
    backend = load(*write_pair(tmp_path, "qwen3", vocab_size=40), LoadConfig(dtype="float32"))
    check_memory(monkeypatch, backend, State, lambda: 0)


@pytest.mark.parametrize(("long_tokens", "limit"), [(20_000, 1.15), (900, 1.05)])
def test_memory_that_is_admitted_is_memory_that_is_taken(tmp_path, long_tokens, limit):
    """One sequence of 20k positions beside seven of 1k does not pad the seven to 20k."""
    write_target(
        tmp_path / "target", "qwen3", seed=1, vocab_size=40, layers=8, max_positions=1 << 15
    )
    backend = load(tmp_path / "target", None, LoadConfig(dtype="float32"))
    lengths = [long_tokens] + [900] * 7
    configs = [DecodeConfig(method="ar", max_tokens=length) for length in lengths]
    each = [backend.state_nbytes(length + 3, drafts=False) for length in lengths]
    scheduler = Scheduler(backend, SchedulerConfig(max_bytes=int(limit * sum(each))))
    for i, config in enumerate(configs):
        scheduler.submit(Request(prompt_ids=[5, 6 + i], config=config))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(4):
        scheduler.step()
    assert scheduler.running == 8
    assert sum(each) / 2 < scheduler.nbytes <= scheduler.config.max_bytes
    # A move holds one layer twice, and a pass has its own arrays.
    assert mx.get_peak_memory() - before < scheduler.config.max_bytes + sum(each) / 4
    scheduler.close()


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Two models on a GPU that has room for them and for one and a half sequences of `length`."""
    for i in range(2):
        write_target(tmp_path / f"{i}", "qwen3", seed=i, vocab_size=40, max_positions=1 << 15)
    before = MEMORY.nbytes  # of other tests
    loaded = [load(tmp_path / f"{i}", None, LoadConfig(dtype="float32")) for i in range(2)]
    size = loaded[0].state_nbytes(1000, drafts=False)
    models = before + sum(backend.weights_bytes for backend in loaded)
    monkeypatch.setattr(MEMORY, "limit", lambda: models + 3 * size // 2)
    return loaded


def test_models_share_the_memory_of_a_gpu(models, monkeypatch):
    first, second = models
    running = first.open(1000, drafts=False)
    for open_another in (second.open, first.open):
        with pytest.raises(MemoryInUseError, match=r"no room for another .* until a sequence ends"):
            open_another(1000, drafts=False)
    with pytest.raises(MemoryInUseError):
        running.fork(0, 1000)
    running.fork(0, 8).close()
    with pytest.raises(MemoryShortError, match="shorten the prompt"):
        first.open(2000, drafts=False)
    running.close()
    other = second.open(1000, drafts=False)
    monkeypatch.setattr(MEMORY, "limit", lambda: 1)  # they were loaded with `force`
    assert first.open(1000, drafts=False)
    assert first.device_report().others_bytes >= second.weights_bytes
    assert other.length == 0


def test_a_text_that_does_not_fit_is_refused(models):
    """Whoever asks, and before it is allocated."""
    config = DecodeConfig(method="ar", max_tokens=2000)
    scheduler = Scheduler(models[0])
    scheduler.submit(Request(prompt_ids=[5], config=config))
    ((_, error),) = scheduler.step()
    assert isinstance(error, MemoryShortError)


def test_a_model_beside_others_is_refused_for_their_memory(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(100))
    refuse_size([file], 200, taken=100)
    with pytest.raises(MemoryShortError, match=r"other models leave 0\.0 GiB"):
        refuse_size([file], 200, taken=101)
    with pytest.raises(ConfigError, match="use a conversion in fewer bits") as refused:
        refuse_size([file], 99, taken=101)
    assert not isinstance(refused.value, MemoryShortError)


def test_padding_is_admitted_too(tmp_path):
    """Sequences of a class are padded to the largest, and wait where that does not fit."""
    write_target(tmp_path / "target", "qwen3", seed=1, vocab_size=40, max_positions=1 << 15)
    backend = load(tmp_path / "target", None, LoadConfig(dtype="float32"))
    states = [(2000, False), (1100, False), (1100, False)]
    alone = [backend.state_nbytes(capacity, drafts=False) for capacity, _ in states]
    backend.target.batches = False
    assert backend.states_nbytes(states) == sum(alone)
    backend.target.batches = True
    assert backend.states_nbytes(states) == 3 * alone[0] > sum(alone)
    scheduler = Scheduler(backend, SchedulerConfig(max_bytes=int(2.9 * alone[0])))
    for capacity, _ in states:
        config = DecodeConfig(method="ar", max_tokens=capacity - 3)
        scheduler.submit(Request(prompt_ids=[5, 6], config=config))
    for _ in range(2):
        scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    assert scheduler.nbytes == 2 * alone[0]
    scheduler.close()


def test_states_are_written_in_place(tmp_path):
    """While the same sequences run together, a pass and a commit copy no keys and values."""
    backend = load(*write_pair(tmp_path, "qwen3", max_positions=1 << 15), LoadConfig(device="cpu"))
    for count in (1, 3):
        states = [backend.open(20_000, drafts=False) for _ in range(count)]
        tree, path = DraftTree.chain(np.arange(5, dtype=np.int32)), np.array([0, 1], np.int32)
        peaks = []
        for _ in range(3):
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            verified = backend.verifier.run(
                [Verify(state, tree, SamplingParams()) for state in states]
            )
            backend.verifier.commit(verified, [(state, path) for state in states])
            mx.synchronize()
            peaks.append(mx.get_peak_memory() - before)
        assert peaks[0] > states[0].nbytes > 4 * peaks[2]


@pytest.mark.parametrize("call", [1, 3])
def test_a_move_that_fails_changes_no_sequence(rng, call):
    sequences, expected = [KVCache(3, 40 + 300 * i) for i in range(2)], []
    for sequence in sequences:
        rows = mx.array(rng.normal(size=(3, 2, 1, 2, 9, 32)), mx.float32)
        for layer in range(3):
            share_storage([sequence]).write(layer, list(rows[layer]), 0)
        sequence.length = 9
        expected.append(np.array(rows)[:, :, 0])
    fresh, error = KVCache(3, 40), RuntimeError("[malloc] Unable to allocate 5 bytes.")
    with failing(BatchStorage, "fill", error, call=call), pytest.raises(RuntimeError):
        share_storage([*sequences, fresh])
    assert fresh.storage is None
    for sequence, rows in zip(sequences, expected, strict=True):
        assert share_storage([sequence]).columns == sequence.columns
        np.testing.assert_array_equal(sequence.read(), rows)
    share_storage(sequences)
    for sequence, rows in zip(sequences, expected, strict=True):
        np.testing.assert_array_equal(sequence.read(), rows)
