"""Memory that is set aside, shared and given back, and what the backend tells about its device."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
from failures import failing
from memory import check_memory
from parts import load_with_parts, use_models
from stand_ins import stand_in

from treeflash.config import GIB, DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.decoding.interfaces import Prefill, Verify, device_report
from treeflash.decoding.sampling import Noise, SamplingParams
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError
from treeflash.testing import require
from treeflash.testing.models import write_pair, write_target

require("torch")

import torch
from fake_cuda import DEVICE
from treeflash_cuda import backend as loading
from treeflash_cuda import memory, target_loading
from treeflash_cuda.backend import load
from treeflash_cuda.cache import Arena, KVCache
from treeflash_cuda.drafter_loading import load_drafter_operations
from treeflash_cuda.gpu.host_copies import HostCopies
from treeflash_cuda.gpu.kernel_loading import CHECKS
from treeflash_cuda.hf import attention_contexts
from treeflash_cuda.memory import FREE_MEMORY_SHARE, MEASURED_TEXTS, TABLE
from treeflash_cuda.operations import Operations
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


def test_tables_of_many_sampled_texts_have_memory_beside_what_is_set_aside(
    cuda, tmp_path, monkeypatch
):
    """As on a GPU of 24 GB, where they need more than a pass of the target."""
    stand_in(monkeypatch, memory, MAX_ROWS=8)
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


def test_a_processor_reports_what_runs_on_it(folders):
    backend = loading.load(*folders, LoadConfig(device="cpu", dtype="float32"))
    report = device_report(backend)
    assert report.facts["torch"] == torch.__version__
    assert "transformers" in report.facts
    assert report.free_bytes is None
    assert not report.kernels
    parameters = [*backend.target.model.parameters(), *backend.drafter_model.parameters()]
    parameters += backend.head.module.parameters()
    parameters += [layer.mixer.head_norms for layer in backend.target.model.layers]
    expected = {parameter.data_ptr(): parameter.nbytes for parameter in parameters}
    assert report.weights_bytes == sum(expected.values()) > 0


def test_a_gpu_reports_its_card_its_kernels_and_the_memory_set_aside(cuda, folders):
    cuda.free_bytes = 10 * GIB
    backend = loading.load(*folders, LoadConfig(dtype="bfloat16"))
    state = backend.open(40, drafts=True)
    backend.verifier.run([Prefill(state, [3, 4, 5], None)])
    backend.verifier.run([Verify(state, DraftTree.root_only(6), SamplingParams())])
    report = device_report(backend)
    assert (report.facts["device"], report.facts["capability"]) == ("fake", "9.0")
    assert report.facts["memory"] == "10.0 GiB"
    assert report.facts["CUDA"] == torch.version.cuda
    graphs = report.kernels.pop("CUDA graphs")
    assert graphs == {"the target": "used (2 graphs)"}
    # The stand-in has no kernel for sampling. The drafter has heads of another width.
    verdicts = dict.fromkeys(("bfloat16", "bfloat16, drafter"), "used (Triton)")
    assert report.kernels == {name: verdicts for name in CHECKS if name != "sample_rows"}
    assert report.free_bytes == pytest.approx(8.5 * GIB, rel=0.03)


def test_a_drafter_of_other_shapes_has_its_own_operations(cuda, folders, monkeypatch):
    """They are checked at load with its shapes, and reported beside the target's."""
    backend = loading.load(*folders, LoadConfig(dtype="bfloat16"))
    found = []

    def load_operations(shapes, *_):
        found.append(shapes)
        return Operations(reasons={"gated": "ptxas is missing"})

    stand_in(monkeypatch, target_loading, load_operations=load_operations)
    sizes = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    sizes = {name: getattr(backend.target.config, name) for name in sizes}
    config = replace(backend.drafter_config, **sizes)
    operations = load_drafter_operations(config, backend.target, None)
    assert operations is backend.target.operations
    backend.drafter_model.operations = operations
    assert device_report(backend).kernels["gated"] == {"bfloat16": "used (Triton)"}
    config = replace(config, head_dim=64, attention_sinks=True)
    with pytest.warns(UserWarning, match="^in the drafter gated runs in PyTorch: ptxas is missing"):
        own = load_drafter_operations(config, backend.target, None)
    backend.drafter_model.operations = own
    (shapes,) = found
    assert (shapes.heads, shapes.head_dim, shapes.sinks) == (4, 64, True)
    verdicts = device_report(backend).kernels["gated"]
    assert verdicts == {"bfloat16": "used (Triton)", "bfloat16, drafter": "ptxas is missing"}


def test_a_gpu_is_examined_without_a_model(cuda):
    report = loading.examine_device(LoadConfig())
    verdicts = {f"bfloat16, heads of {width}": "used (Triton)" for width in (64, 128, 256)}
    assert report.kernels == {name: verdicts for name in CHECKS if name != "sample_rows"}
    assert report.available_bytes == cuda.free_bytes


@pytest.mark.sample(1)
@pytest.mark.parametrize("runs", [True, False])
def test_passes_over_trees_are_measured_if_the_target_has_them(cuda, tmp_path, monkeypatch, runs):
    use_models(monkeypatch)
    stand_in(monkeypatch, attention_contexts, is_window=lambda *_: runs)
    peaks = {"memory_allocated": lambda _: 2, "max_memory_allocated": lambda _: 5}
    stand_in(monkeypatch, torch.cuda, **peaks)
    write_target(tmp_path, "mistral", seed=1)
    refused = nullcontext() if runs else pytest.warns(UserWarning, match="without CUDA graphs")
    with refused:
        backend = loading.load(tmp_path, None, LoadConfig(dtype="bfloat16"))
    assert memory.pass_nbytes(backend.target) == (3 if runs else 0)


@pytest.mark.parametrize(
    ("share", "pass_nbytes", "reserved"),
    [(0.85, 0, 6.8), (0.85, GIB, 5.1), (0.2, GIB, 1.2), (0.85, 5 * GIB, 0)],
)
def test_memory_is_set_aside_beside_the_largest_pass(
    folders, see_memory, share, pass_nbytes, reserved
):
    backend = loading.load(*folders, LoadConfig(device="cpu", dtype="float32"))
    see_memory(8 * GIB, 24 * GIB)
    arenas = backend.target.arena, backend.drafter_arena
    memory.reserve_memory(backend.target, backend.drafter_arena, 2 * pass_nbytes, share)
    assert sum(x.reserved_nbytes for x in arenas) == pytest.approx(reserved * GIB, abs=2)
    columns = [x.reserved_nbytes // x.column_nbytes for x in arenas]
    assert abs(columns[0] - columns[1]) <= 1


def test_memory_of_which_nothing_is_left_is_not_unknown(folders, see_memory, monkeypatch):
    backend = load_with_parts(monkeypatch, *folders)
    stand_in(monkeypatch, backend.target, threads=None)  # as on a GPU
    see_memory(GIB, 24 * GIB)
    assert backend.device_report().reserved_bytes is None
    memory.reserve_memory(backend.target, backend.drafter_arena, GIB, 0.85)
    report = backend.device_report()
    assert (report.reserved_bytes, report.free_bytes) == (0, 0)


def test_a_sequence_that_fits_by_its_size_can_be_opened(folders, see_memory, monkeypatch):
    """The rows of a draft may need a page more than the target does."""
    backend = load_with_parts(monkeypatch, *folders)
    arenas = backend.target.arena, backend.drafter_arena
    page, block = PAGE, backend.drafter_config.scratch_rows
    for arena in arenas:
        arena.page = page
    each = sum(arena.column_nbytes for arena in arenas)
    see_memory(11 * page * each // 2, 24 * GIB)
    memory.reserve_memory(backend.target, backend.drafter_arena, 0, 1.0)
    total = sum(arena.reserved_nbytes for arena in arenas)
    fitting = [
        capacity
        for capacity in range(5 * page + 2)
        if backend.state_nbytes(capacity, drafts=True) <= total
    ]
    assert max(fitting) == 5 * page - block
    for capacity in fitting[-block:]:
        backend.open(capacity, drafts=True).close()


@pytest.mark.parametrize(("free", "positions"), [((8, 24), 4), ((24, 2), 2)])
def test_the_gpu_with_the_least_room_decides(folders, see_memory, free, positions):
    """It has a part of the layers, and the first one has the drafter too."""
    gpus = [torch.device("cuda", n) for n in range(2)]
    target = loading.load(folders[0], None, LoadConfig(device="cpu", dtype="float32")).target
    layers, half = target.arena.layers // 2, target.arena.column_nbytes // 2
    drafter = Arena(layers)
    drafter.set_shape(target.arena.like)
    target.device, target.spans = gpus[0], [(gpu, layers) for gpu in gpus]
    free = dict(zip(gpus, free, strict=True))
    see_memory(lambda gpu: free[gpu] * half)
    memory.reserve_memory(target, drafter, 0, 1.0)
    found = [x.reserved_nbytes // x.column_nbytes for x in (target.arena, drafter)]
    assert found == [positions, positions]


@pytest.mark.parametrize("fits", [True, False])
def test_recurrent_states_have_memory_beside_keys_and_values(
    tmp_path, monkeypatch, see_memory, fits
):
    write_target(tmp_path, "qwen3_5", seed=1)
    target = load_with_parts(monkeypatch, tmp_path).target
    wanted = memory.STATES_EACH * memory.STATE_SEQUENCES
    free = (8 * wanted if fits else wanted) * target.states_nbytes
    see_memory(free, free)
    memory.reserve_memory(target, None, 0, 0.5)
    states = wanted if fits else wanted // 4
    assert target.state_arena.slots == states + 1
    assert target.arena.reserved_nbytes == free // 2 - states * target.states_nbytes


def test_a_model_that_its_owner_goes_on_using_keeps_most_memory(cuda, folders):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folders[0], dtype=torch.bfloat16, attn_implementation="eager"
    )
    cuda.free_bytes = 10 * GIB
    report = device_report(loading.wrap(model.to("cuda"), None))
    assert report.free_bytes == pytest.approx(2 * GIB, rel=0.03)


class LateDevice:
    """A device that copies on a stream of its own, only when somebody waits for its events.

    Attributes:
        queue: what the stream has still to do.
        kept: tensors that the stream reads, for which memory is kept.
    """

    def __init__(self, monkeypatch):
        self.queue, self.kept, inside = [], [], []
        plain_empty, plain_copy = torch.empty, torch.Tensor.copy_

        @contextmanager
        def on_stream(stream):
            inside.append(stream)
            yield
            inside.pop()

        def copy(target, source, non_blocking=False):
            if not inside:
                return plain_copy(target, source)
            assert non_blocking, "the host would wait"
            self.queue.append(lambda: plain_copy(target, source))
            return target

        def empty(*shape, pin_memory=False, **settings):
            return plain_empty(*shape, **settings).fill_(-1)

        stand_in(
            monkeypatch,
            torch.cuda,
            Stream=lambda device: self,
            Event=lambda blocking: self,
            current_stream=lambda device: None,
            stream=on_stream,
        )
        keep = self.kept.append
        stand_in(monkeypatch, torch.Tensor, copy_=copy, record_stream=lambda x, _: keep(x))
        stand_in(monkeypatch, torch, empty=empty)

    def wait_stream(self, stream):
        """The stream begins when the current one is done, which is at once."""

    def record_event(self, event):
        return event

    def synchronize(self):
        while self.queue:
            self.queue.pop(0)()


def test_a_copy_has_what_the_tensor_showed_when_it_began(monkeypatch):
    device, copies = LateDevice(monkeypatch), HostCopies()
    storage = torch.arange(24.0).view(4, 6)
    expected = storage[:, 1:4].numpy().copy()
    copied = copies.begin(storage[:, 1:4])
    wait = copies.end()
    storage.zero_()  # another sequence has the columns
    assert len(device.queue) == len(device.kept) == 1
    np.testing.assert_array_equal(copied.numpy(), -np.ones((4, 3)))
    wait()
    np.testing.assert_array_equal(copied.numpy(), expected)


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_nothing_waits_for_a_state_that_is_exported(cuda, family, tmp_path):
    backend = load(*write_pair(tmp_path, family), LoadConfig(dtype="bfloat16"))
    state = backend.open(40, drafts=True)
    backend.verifier.run([Prefill(state, [3, 4, 5, 6], None)])
    with cuda.transfers() as count:
        export = state.export(0, 4, end=True)
    assert count.reads == len(export.begun)
    assert cuda.waited == []
    assert {x.dtype for x in export.begun.values()} <= {np.dtype(np.uint16), np.dtype(np.float32)}
    assert export.arrays() is export.begun
    assert cuda.waited == [DEVICE]
