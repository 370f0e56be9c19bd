"""Several devices: processes that share each layer, and layers that devices share out.

Two processes on CPUs, of one machine or two, give the tokens of one. `test_fake_cuda.py` has
several devices without values; here values are compared.
"""

import copy
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from failures import failing
from parts import use_models
from recordings import recording
from stand_ins import stand_in

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.interfaces import Prefill
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.decoding.session import SequenceSession
from treeflash.errors import ConfigError, NumericalError
from treeflash.testing import require
from treeflash.testing.comparisons import generate, random_tokens, steps_of
from treeflash.testing.models import write_pair, write_target

require("torch")

import torch
from transformers import AutoModelForCausalLM
from treeflash_cuda import backend as backend_module
from treeflash_cuda import target_loading, verifier
from treeflash_cuda.backend import CudaBackend, check_config, load
from treeflash_cuda.cache import Arena, KVCache
from treeflash_cuda.gpu import parallel
from treeflash_cuda.gpu.graphs import Graphs
from treeflash_cuda.hf.model_target import ModelTarget, follow_devices, load_model
from treeflash_cuda.operations import Operations
from treeflash_cuda.state import State
from treeflash_cuda.target import read_model_config
from treeflash_cuda.verifier import Verifier
from treeflash_cuda.visible_keys import PAGE

PROMPT = [3, 4, 5, 6]
PROMPTS = PROMPT, PROMPT[::-1]
CONFIG = {"budget": 8, "max_tokens": 24}
LOADING = "target, drafter, written = map(Path, sys.argv[1:])"
SCRIPT = f"""
import json, sys
from pathlib import Path

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler, decode
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash_cuda import verifier
from treeflash_cuda.backend import load

{LOADING}
backend = load(target, drafter, LoadConfig(device="cpu", dtype="float32"))
found = []
for method in ("treeflash", "ar"):
    config = DecodeConfig(method=method, **{CONFIG})
    steps = decode(backend, Request(prompt_ids={PROMPT}, config=config))
    found.append([int(token) for step in steps for token in step.tokens])
backend.open(50, drafts=True).fork(0, 50).close()
sample = verifier.sample

def fail_once(*args):  # on this rank alone, after the forward pass
    verifier.sample = sample
    raise MemoryError

verifier.sample = fail_once
config = DecodeConfig(**{CONFIG})
texts = [[], []]
requests = [Request(prompt_ids={PROMPTS}[n], config=config, tag=texts[n]) for n in range(2)]
scheduler = Scheduler(backend, prefix_cache=PrefixCache(1 << 30))  # copies the final states
for request, step in scheduler.decode(requests):
    request.tag.extend(step.tokens)
found += texts
written.write_text(json.dumps(found))
"""


GRAPHS = """
import atexit, os
from treeflash_cuda import target_loading
from treeflash_cuda.gpu import graphs
from treeflash_cuda.gpu.graphs import Graphs
from treeflash_cuda.operations import Operations
from treeflash_cuda.target import PASS_NAME
from replayed_graphs import replayed

# As on a GPU, trees run by the operation for trees in graphs. A replay computes anew.
target_loading.load_target_operations = lambda *_: Operations()
Graphs.is_capturing = property(lambda self: self.enabled)
graphs.MAX_GRAPHS = 2  # many are captured again
capture, captured = Graphs._capture, []

def record(self, function, places, **_):
    outputs = function(*places)
    if os.environ["RANK"] == "1" and len(captured) == 1:
        raise RuntimeError("out of paper")
    return replayed(function, places, outputs)

def watch(self, key, function, inputs):
    graph = capture(self, key, function, inputs)
    if key[0] == PASS_NAME:
        captured.append([[list(x.shape) for x in inputs], graph is not None])
    return graph

Graphs.record, Graphs._capture = record, watch
path = Path(sys.argv[3]).with_name("captured" + os.environ["RANK"])
atexit.register(lambda: path.write_text(json.dumps(captured)))
"""


IDLE = """
import time
from datetime import timedelta
import torch.distributed as dist

dist.init_process_group("gloo", timeout=timedelta(seconds=15))  # transformers has hours
"""


LAUNCHER = sys.executable, "-m", "torch.distributed.run"


def start(tmp_path, text, *launchers, **variables):
    """Run a script on a pair with two processes; returns the written file, and what was printed."""
    pair, script = write_pair(tmp_path, "qwen3"), tmp_path / "script.py"
    script.write_text(text)
    written = tmp_path / "tokens.json"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))} | variables
    agents = [
        subprocess.Popen(
            [*LAUNCHER, *launcher, *map(str, (script, *pair, written))],
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        for launcher in launchers
    ]
    try:
        printed = [agent.communicate(timeout=300)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return written, [agent.returncode for agent in agents], "\n".join(printed)


def tokens_of_one_process(tmp_path):
    """What `SCRIPT` writes of the same pair."""
    pair = tmp_path / "target", tmp_path / "drafter"
    backend = load(*pair, LoadConfig(device="cpu", dtype="float32"))
    texts = [(PROMPT, "treeflash"), (PROMPT, "ar"), *((x, "treeflash") for x in PROMPTS)]
    return [
        generate(backend, prompt, DecodeConfig(method=method, **CONFIG)) for prompt, method in texts
    ]


# Three processes import PyTorch. `Ranks` runs both ranks in this one.
@pytest.mark.nightly
@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_give_the_tokens_of_one(tmp_path, machines):
    """On one machine trees run in graphs; two have an agent each on the loopback interface."""
    if machines == 1:
        launchers = [("--standalone", "--nproc-per-node", "2")]
        script = SCRIPT.replace(LOADING, GRAPHS + LOADING)
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        rendezvous = f"--rdzv-backend=c10d --rdzv-id=test --rdzv-endpoint=127.0.0.1:{port}"
        launchers = [(*rendezvous.split(), "--nnodes=2", "--nproc-per-node=1")] * 2
        script = 'import os\nassert os.environ["LOCAL_WORLD_SIZE"] == "1"\n' + SCRIPT
    written, codes, printed = start(tmp_path, script, *launchers, GLOO_SOCKET_IFNAME="lo")
    assert codes == [0] * machines, printed[-3000:]
    assert json.loads(written.read_text()) == tokens_of_one_process(tmp_path)
    if machines == 1:
        captured, other = (json.loads((tmp_path / f"captured{i}").read_text()) for i in (0, 1))
        assert captured == other
        assert [succeeded for _, succeeded in captured].count(False) == 1
        assert len(captured) > len({str(sizes) for sizes, _ in captured}) > 2


@pytest.mark.nightly
def test_ranks_wait_for_a_message_longer_than_for_each_other(tmp_path):
    """As in a server that has no requests overnight."""
    script = IDLE + SCRIPT.replace("backend.open(50,", "time.sleep(20)\nbackend.open(50,")
    written, codes, printed = start(tmp_path, script, ("--standalone", "--nproc-per-node", "2"))
    assert codes == [0], printed[-3000:]
    assert json.loads(written.read_text()) == tokens_of_one_process(tmp_path)


def test_a_follower_that_fails_ends_its_process(monkeypatch, capsys):
    """Whatever the communication library does with an open connection."""
    statuses = []
    stand_in(monkeypatch, parallel.dist, get_rank=lambda: 1)
    stand_in(monkeypatch, parallel.os, _exit=statuses.append)
    with failing(parallel, "broadcast", RuntimeError("out of paper\nand ink")):
        parallel.follow(SimpleNamespace())
    assert statuses == [1]
    assert capsys.readouterr().err == "error: rank 1 failed: out of paper\n"


class Ranks:
    """Rank 0 in this thread and another rank in a second one, with the whole of a tiny target.

    Each has its own arena. Rank 0 waits after each message until the other rank has done what
    the message says.
    """

    def __init__(self, monkeypatch, folder, reserved=None):
        write_target(folder, "llama", seed=3)
        self.target = load(folder, None, LoadConfig(device="cpu", dtype="float32")).target
        self.target.split = True
        follower = copy.copy(self.target)
        follower.arena = copy.copy(self.target.arena)
        follower.arena.slabs = []
        self.target.arena.reserved_nbytes = reserved
        self.arenas = self.target.arena, follower.arena
        self.messages, self.replies = queue.Queue(), queue.Queue()
        self.leading, self.following = [], []  # states, in the order in which they were opened
        stand_in(
            monkeypatch,
            parallel,
            followers=parallel.Followers(),
            broadcast=self.broadcast,
            State=self.follow_state,
            _leave=lambda: None,
        )
        self.thread = threading.Thread(target=parallel.follow, args=(follower,), daemon=True)
        self.thread.start()
        self.replies.get(timeout=120)  # it waits for its first message
        self.backend = CudaBackend(self.target, None, None)
        plain = parallel.LeaderState.__init__

        def init(state, *args):
            self.leading.append(state)
            plain(state, *args)

        stand_in(monkeypatch, parallel.LeaderState, __init__=init)

    def broadcast(self, message=None):
        if message is None:
            self.replies.put("done")
            return self.messages.get()
        self.messages.put(copy.deepcopy(message))
        return self.replies.get(timeout=120)

    def follow_state(self, *args):
        self.following.append(State(*args))
        return self.following[-1]

    def check(self):
        """Both ranks have the same keys and values in states that are not closed."""
        parallel.followers.send()
        assert [x.length for x in self.leading] == [x.length for x in self.following]
        for mine, theirs in zip(self.leading, self.following, strict=True):
            if mine.length:
                assert np.array_equal(mine.read_kv_cache(), theirs.read_kv_cache())
        assert places(self.leading) == places(self.following)

    def fail(self, patch, owner, name, at, error=MemoryError):
        """Let one call of a function, with this number, fail on rank 0."""
        whole, rank_0, calls = getattr(owner, name), threading.get_ident(), []

        def call(*args, **options):
            if threading.get_ident() == rank_0:
                calls.append(args)
                if len(calls) == at:
                    raise error("out of memory")
            return whole(*args, **options)

        patch.setattr(owner, name, call)
        return calls


def places(states):
    """The slab and the pages of each state; None for one that is closed."""
    caches = [state.kv_cache for state in states]
    slabs = caches[0].arena.slabs if states else []
    return [None if x.slab is None else (slabs.index(x.slab), x.pages.tolist()) for x in caches]


@pytest.fixture
def ranks(monkeypatch, tmp_path, request):
    ranks = Ranks(monkeypatch, tmp_path / "target", getattr(request, "param", None))
    yield ranks
    ranks.messages.put([("end",)])
    ranks.thread.join(20)
    assert not ranks.thread.is_alive()


@pytest.mark.parametrize("ranks", [None, 0, 1 << 17], indirect=True)
def test_sequences_lie_in_the_same_slabs_on_every_rank(ranks):
    """Each slab has its own forward pass, in which all ranks must take part."""
    for arena in ranks.arenas:
        arena.slab_nbytes = 1
    states = [ranks.backend.open(n, drafts=False) for n in (20, 30, 25)]
    ranks.backend.verifier.run([Prefill(state, [5, 6, 7], None) for state in states])
    ranks.check()
    assert len(ranks.target.arena.slabs) == (1 if ranks.target.arena.reserved_nbytes else 3)
    states[1].close()
    fork = states[0].fork(2, 26)
    ranks.check()
    for state in (*states, fork):
        state.close()


def test_forks_share_the_same_pages_on_every_rank(ranks):
    for arena in ranks.arenas:
        arena.page = PAGE
    state = ranks.backend.open(2 * PAGE, drafts=False)
    ranks.backend.verifier.run([Prefill(state, [5] * PAGE, None)])
    with closing(state.fork(PAGE - 1, 2 * PAGE)):
        ranks.check()
        tokens = [x.kv_cache.shared_token for x in (*ranks.leading, *ranks.following)]
        assert tokens == [None, 5, None, 5]
    state.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_graphs_are_dropped_before_the_communicator_ends(monkeypatch, rank):
    """NCCL waits for graphs that use a communicator until they are destroyed."""

    class Split:
        graphs = Graphs(torch.device("cpu"))
        operations = None

    left, store = [], Split.graphs.store
    store["the target", None, None] = None
    stand_in(
        monkeypatch,
        parallel.dist,
        is_initialized=lambda: True,
        destroy_process_group=lambda: left.append(len(store)),
    )
    stand_in(monkeypatch, parallel, broadcast=lambda *_: [("end",)], RELEASE_S=0)
    if rank == 0:
        parallel.end(Split.graphs)
    else:
        parallel.follow(Split())
    assert left == [0]


@pytest.mark.parametrize("attends", [True, False])
def test_kernels_that_a_rank_refuses_run_on_no_rank(monkeypatch, tmp_path, attends):
    """Ranks that run other kernels would wait for each other."""

    def gather(found, mine):
        found[:] = [mine, {"gated": "ptxas is missing"} if isinstance(mine, dict) else attends]

    stand_in(monkeypatch, parallel.dist, get_world_size=lambda: 2, all_gather_object=gather)
    write_target(tmp_path, "llama", seed=3)
    target = load(tmp_path, None, LoadConfig(device="cpu", dtype="float32")).target
    kernels = Operations(rms_norm=print, gated=print)
    stand_in(
        monkeypatch,
        target_loading,
        load_target_operations=lambda *_: kernels,
        load_prompt_attention=lambda *_: print,
    )
    target.split = True
    target_loading.add_kernels(target)
    assert target.operations.has_kernel("rms_norm")
    assert not target.operations.has_kernel("gated")
    assert target.operations.reasons == {"gated": "on rank 1, ptxas is missing"}
    assert (target.prompt_attention is not None) == attends


PLACES = {"sampling": (verifier, "sample"), "commit": (Verifier, "commit_paths")}


@pytest.mark.sample(3)
@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize("place", PLACES)
def test_ranks_stay_equal_when_rank_0_alone_fails(ranks, monkeypatch, place, at):
    config = DecodeConfig(method="ar", max_tokens=6)
    prompts = [[5, 6, 7], [9, 8]]
    alone = [generate(ranks.backend, p, config) for p in prompts]
    calls = ranks.fail(monkeypatch, *PLACES[place], at)
    texts = [[], []]
    requests = [Request(prompt_ids=prompts[n], config=config, tag=texts[n]) for n in range(2)]
    for request, step in Scheduler(ranks.backend).decode(requests):
        request.tag.extend(step.tokens)
        ranks.check()
    assert len(calls) > at
    assert texts == alone
    assert not any(state.length for state in ranks.following)


def test_a_sequence_without_a_token_to_choose_does_not_change_the_other_ranks(ranks):
    class Nothing:
        end_tokens = frozenset()

        def allowed(self):
            return np.zeros(-(-ranks.backend.vocab_size // 32), np.uint32)

    config = DecodeConfig(method="ar", max_tokens=6)
    expected = generate(ranks.backend, [5, 6, 7], config)
    scheduler = Scheduler(ranks.backend)
    bad = scheduler.submit(Request(prompt_ids=[1, 2], config=config, constraint=Nothing()))
    scheduler.submit(Request(prompt_ids=[5, 6, 7], config=config))
    tokens = []
    for request_id, event in scheduler.run():
        ranks.check()
        if request_id == bad:
            assert isinstance(event, NumericalError)
        else:
            tokens += event.tokens
    assert tokens == expected


def test_an_iteration_has_one_broadcast(ranks):
    """Whatever changes committed positions is sent with the next forward pass."""
    config = DecodeConfig(method="ar", max_tokens=4)
    with recording(parallel, "broadcast") as broadcasts:
        assert len(steps_of(ranks.backend, [5, 6, 7], config)) == 4
    calls = [[name for name, *_ in message[0]] for message in broadcasts if message]
    assert [names.count("forward") for names in calls] == [1] * 4
    assert [names[-1] for names in calls] == ["forward"] * 4
    assert calls[0] == ["reserve", "open", "forward"]


def test_positions_are_dropped_on_every_rank(ranks):
    state = ranks.backend.open(20, drafts=False)
    ranks.backend.verifier.run([Prefill(state, [5, 6, 7, 8], None)])
    state.truncate(2)
    ranks.check()
    ranks.backend.verifier.run([Prefill(state, [9, 5], None)])
    ranks.check()
    for _ in range(2):
        state.close()
        ranks.check()


def test_a_fork_that_fails_leaves_no_state_on_any_rank(ranks, monkeypatch):
    state = ranks.backend.open(20, drafts=False)
    session = [Request(prompt_ids=[5, 6, 7], config=DecodeConfig(method="ar", max_tokens=1))]
    cache = PrefixCache(1 << 20)
    scheduler = Scheduler(ranks.backend, prefix_cache=cache)
    scheduler.submit(*session)
    ranks.fail(monkeypatch, KVCache, "copy_from", 1)
    list(scheduler.run())
    assert len(cache) == 0
    state.close()
    ranks.check()
    assert not any(state.kv_cache.slab for state in ranks.following)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_forward_pass_that_ends_on_rank_0_alone_is_the_last(ranks, monkeypatch, error):
    state = ranks.backend.open(20, drafts=False)
    ranks.fail(monkeypatch, type(ranks.target), "run_rows", 1, error)
    config = DecodeConfig(method="ar", max_tokens=3)
    requests = [Request(prompt_ids=prompt, config=config) for prompt in ([5], [6, 7])]
    interrupted = pytest.raises(error)
    lost = pytest.raises(RuntimeError, match="restart torchrun")
    with lost if error is MemoryError else interrupted:
        list(Scheduler(ranks.backend).decode(requests))
    with pytest.raises(RuntimeError, match="restart torchrun"):
        ranks.backend.open(20, drafts=False)
    state.close()
    stand_in(monkeypatch, parallel.dist, is_initialized=lambda: True)
    parallel.end(ranks.target.graphs)  # tells nobody


@pytest.mark.parametrize(
    "settings",
    [{"adapter": "folder"}, {"device_map": "auto"}, {"exact": True, "device": "cpu"}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_one_process_are_refused_under_torchrun(monkeypatch, settings):
    monkeypatch.setenv("WORLD_SIZE", "2")
    name = next(iter(settings))
    with pytest.raises(ConfigError, match=f"^{name} does not work under torchrun; "):
        check_config(LoadConfig(**settings))


def test_hybrid_targets_are_refused_under_torchrun(tmp_path):
    write_target(tmp_path, "qwen3_5", seed=1)
    device = torch.device("cpu")
    model = load_model(tmp_path, read_model_config(tmp_path), torch.float32, device)
    with pytest.raises(ConfigError, match="torchrun is not supported for models with recurrent"):
        ModelTarget(model, device, pack=False, split=True)


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return write_pair(folder, "mistral", vocab_size=40)


def decoded(backend):
    """Tokens of texts that run together; keys and values of a forked one."""
    scheduler, rng = Scheduler(backend), np.random.default_rng(0)
    found = {}
    for method in ("treeflash", "ddtree", "ar"):
        prompt = random_tokens(rng, 40, 12)
        config = DecodeConfig(method=method, budget=9, max_tokens=20)
        found[scheduler.submit(Request(prompt_ids=prompt, config=config))] = []
    for request_id, step in scheduler.run():
        found[request_id] += step.tokens
    text = SequenceSession(backend)
    text.extend(random_tokens(rng, 40, 9))
    return list(found.values()), text.state.fork(7, 20).read_kv_cache()


@pytest.mark.sample(1)
@pytest.mark.parametrize("bits", [None, 8])
def test_keys_and_values_in_parts_are_those_in_one(pair, bits, monkeypatch):
    use_models(monkeypatch)
    backend = load(*pair, LoadConfig(device="cpu", dtype="float32", kv_bits=bits))
    expected = decoded(backend)
    whole, target = backend.target.arena, backend.target
    spans = [(CPU, 1), (CPU, 2), (CPU, 1)]
    target.arena = Arena(4, whole.dtype, spans)
    follow_devices(target.model, target.layers, CPU)
    tokens, kv_cache = decoded(backend)
    assert [len(part) for part in target.arena.slabs[0].parts] == [1, 2, 1]
    assert tokens == expected[0]
    np.testing.assert_array_equal(kv_cache, expected[1])


def test_a_kernel_runs_where_a_gpu_of_each_kind_passes_its_check(monkeypatch):
    gpus, checked = [torch.device("cuda", n) for n in range(4)], []
    names = dict(zip(gpus, ["A100", "L4", "A100", "L4"], strict=True))
    stand_in(monkeypatch, torch.cuda, get_device_name=names.get)

    def load(shapes, device, dtype):
        checked.append(device)
        reasons = {} if names[device] == "A100" else {"gated": "ptxas is missing"}
        return Operations(rms_norm=triton, gated=triton).without(reasons)

    def triton(*_):
        raise NotImplementedError

    stand_in(monkeypatch, target_loading, load_operations=load)
    with pytest.warns(UserWarning, match="on cuda:1, L4, gated runs in PyTorch: ptxas is missing"):
        found = target_loading.load_target_operations(None, gpus, torch.bfloat16)
    assert checked == gpus[:2]
    assert found.rms_norm is triton
    assert found.gated is Operations().gated
    assert found.reasons == {"gated": "on cuda:1, L4, ptxas is missing"}


@pytest.fixture
def _placed_on_the_cpu(monkeypatch):
    for module in (backend_module, target_loading):
        stand_in(monkeypatch, module, choose_device=lambda name: CPU)


@pytest.mark.usefixtures("_placed_on_the_cpu")
def test_layers_outside_of_gpus_are_refused(pair):
    """Accelerate places a model that does not fit on the CPU."""
    with pytest.raises(ConfigError, match="does not fit into the GPUs"):
        load(*pair, LoadConfig(device_map="auto"))


@pytest.mark.usefixtures("_placed_on_the_cpu")
def test_recurrent_layers_are_refused(tmp_path):
    write_target(tmp_path, "qwen3_5", seed=1)
    with pytest.raises(ConfigError, match="device_map is not supported for models with recurrent"):
        load(tmp_path, None, LoadConfig(device_map="auto"))


def test_a_model_of_transformers_on_several_devices_is_refused(pair):
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    model.lm_head.to("meta")
    with pytest.raises(ConfigError, match="the model is on several devices; load it on one"):
        backend_module.wrap(model, None)
