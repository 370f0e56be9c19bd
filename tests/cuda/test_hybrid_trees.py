"""Trees of hybrid targets as functions of tensors, and faults that the check at load refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
from failures import failing
from parts import use_models
from stand_ins import stand_in

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Prefill, Verify
from treeflash.decoding.probe import state_difference, tree_difference
from treeflash.decoding.sampling import SamplingParams
from treeflash.decoding.tree import DraftTree
from treeflash.errors import UnsupportedModelError
from treeflash.testing import HYBRID_FAMILIES, require, write_drafter
from treeflash.testing.comparisons import path_to, random_tokens, random_tree
from treeflash.testing.models import write_pair, write_target
from treeflash.testing.pairs import DRAFTER_SEED, TARGET_SEED

require("torch")

import torch
from families import PREFIX, TOLERANCE
from families import cuda as families
from faulty_kernels import plant
from parts import load_with_parts
from replayed_graphs import ReplayedGraphs, fix_addresses
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from treeflash_cuda import recurrence, recurrent_states, target_loading
from treeflash_cuda.backend import CudaBackend, load
from treeflash_cuda.cpu.decoder_target import CpuTarget
from treeflash_cuda.gpu.state_arena import MIN_SLOTS, WrittenTree
from treeflash_cuda.hf import hybrid, model_target
from treeflash_cuda.hf.hybrid import HybridCache, RecurrentCache
from treeflash_cuda.hf.model_pass import ModelPasses
from treeflash_cuda.operations import Operations
from treeflash_cuda.recurrence import TreeNodes, delta_rule
from treeflash_cuda.recurrent_states import Writes
from treeflash_cuda.target_loading import load_target

from treeflash.decoding.backend_base import project_contexts

pytestmark = pytest.mark.sample(1)

VOCAB = 40
CPU = LoadConfig(device="cpu", dtype="float32")
TYPES = ("mamba2", "lfm2")  # without attention layers; without matrices
OTHERS = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid", "lara_mini"),
    *("bamba", "granitemoehybrid", "nemotron_h", "zamba2", "lfm2_moe", "lfm3", "falcon_h1"),
)


@pytest.fixture(params=HYBRID_FAMILIES)
def folders(request, tmp_path):
    return write_pair(tmp_path, request.param, vocab_size=VOCAB)


@pytest.mark.sample(1)
@pytest.mark.parametrize("sequences", [1, 3])
def test_trees_are_those_of_one_sequence_after_another(folders, monkeypatch, sequences):
    """Logits, states, keys and features, in graphs with the addresses and sizes of a capture."""
    static = load_with_parts(monkeypatch, *folders)
    static.target.graphs = ReplayedGraphs()
    found = []
    for backend in (static, load(*folders, CPU)):
        rng, results = np.random.default_rng(sequences), []
        states = [backend.open(100, drafts=True) for _ in range(sequences)]
        prompts = [random_tokens(rng, VOCAB, n) for n in (12, 1, 5)[:sequences]]
        work = [Prefill(state, x, None) for state, x in zip(states, prompts, strict=True)]
        backend.verifier.run(work)
        for sizes in ((9, 1, 14), (6, 12, 16), (1, 1, 1), (10, 9, 3)):
            trees = [random_tree(rng, 7, n, VOCAB) for n in sizes[:sequences]]
            pairs = list(zip(states, trees, strict=True))
            backend.verifier.logits([(state, DraftTree.root_only(3)) for state in states])
            results += backend.verifier.logits(pairs).logits
            verified = backend.verifier.run([Verify(*x, SamplingParams()) for x in pairs])
            paths = [path_to(tree, int(rng.integers(len(tree)))) for tree in trees]
            # One of them drops its tree.
            backend.verifier.commit(verified, list(zip(states, paths, strict=True))[-2:])
            results += [x for state in states for x in state.read_recurrent_states()]
            with torch.inference_mode():
                project_contexts(states, backend.drafter_model.project, torch.cat)
            results += [torch.cat(state.context).numpy() for state in states]
        results += [state.read_kv_cache() for state in states]
        found.append(results)
    assert len(found[0]) == len(found[1])
    for graph, plain in zip(*found, strict=True):
        np.testing.assert_allclose(graph, plain, atol=1e-4 * max(1, np.abs(plain).max()))
    assert static.target.graphs.captured["the target"] > 1


# The others have the layers of these two and of the pairs above in other orders.
@pytest.mark.parametrize(
    "name", [*TYPES, *(pytest.param(x, marks=pytest.mark.nightly) for x in OTHERS)]
)
def test_other_types_agree_with_plain_text(tmp_path, monkeypatch, name):
    families.write(tmp_path, name)
    stand_in(monkeypatch, target_loading, load_target_operations=lambda *_: Operations())
    target = load_target(tmp_path, LoadConfig(device="cpu", dtype="float32"), pack=True)
    backend, rng = CudaBackend(target, None, None), np.random.default_rng(0)
    assert tree_difference(backend, rng, PREFIX) < TOLERANCE
    assert state_difference(backend, rng, PREFIX) < TOLERANCE
    state = backend.open(8, drafts=False)
    verified = backend.verifier.run([Verify(state, DraftTree.root_only(3), SamplingParams())])
    written = verified.rows[state].written
    assert isinstance(written, WrittenTree)  # and not the pass of one sequence after another


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_no_graph_reads_states_that_moved(tmp_path, monkeypatch, family):
    """More sequences need more room, and what was their memory may be anything then."""
    write_target(tmp_path, family, seed=1, vocab_size=VOCAB, layers=2)
    static = load_with_parts(monkeypatch, tmp_path)
    static.target.graphs = ReplayedGraphs(with_addresses=True)
    fix_addresses(monkeypatch)
    plain, found, root = load(tmp_path, None, CPU), [], DraftTree.root_only(6)
    for backend in (static, plain):
        states, results = [backend.open(100, drafts=False) for _ in range(8)], []
        for state in states:
            arena = backend.target.state_arena
            old = [] if arena is None else list(arena.tensors)
            verified = backend.verifier.run([Verify(state, root, SamplingParams())])
            backend.verifier.commit(verified, [(state, np.zeros(1, np.int32))])
            if old and old[0] is not arena.tensors[0]:
                with torch.inference_mode():
                    for tensor in old:
                        tensor.fill_(torch.nan)
            results += backend.verifier.logits([(state, root)]).logits
        found.append(results)
    assert static.target.state_arena.slots > MIN_SLOTS
    np.testing.assert_allclose(*found, atol=1e-4)


def test_states_of_all_shapes_grow_or_none_do(folders, monkeypatch):
    """Memory may run out for the last of them; slots that only some have would be read later."""
    arena = load_with_parts(monkeypatch, folders[0]).target.state_arena
    assert len(arena.tensors) > 1
    slots = arena.slots
    with failing(torch.Tensor, "new_zeros", MemoryError, call=2), pytest.raises(MemoryError):
        arena.take(1)
    assert [len(x) for x in arena.tensors] == [slots] * len(arena.tensors)
    (new,) = arena.take(1)
    assert {len(x) for x in arena.tensors} == {arena.slots}
    assert slots <= new.slot < arena.slots


def test_the_state_of_a_finished_sequence_keeps_no_other_alive(folders, monkeypatch):
    backend = load_with_parts(monkeypatch, folders[0])
    states = [backend.open(20, drafts=False) for _ in range(4)]
    tree = DraftTree.root_only(3)
    verified = backend.verifier.run([Verify(state, tree, SamplingParams()) for state in states])
    backend.verifier.commit(verified, [(state, np.zeros(1, np.int32)) for state in states])
    arena = backend.target.state_arena
    assert arena.slots - 1 - len(arena.free) == len(states)
    fork = states[1].fork(1, 20)
    states[2].snapshot()
    for state in states[1:]:
        state.close()
    assert arena.slots - 1 - len(arena.free) == 2  # of the first sequence, and of the fork
    fork.close()
    assert arena.slots - 1 - len(arena.free) == 1


def test_gates_of_single_channels_without_the_depths():
    """As `chunk_kimi_delta_attention` has them: a device does not tell how deep a tree is."""
    rng, torch_rng = np.random.default_rng(4), torch.Generator().manual_seed(4)
    tree, heads, n, dk, dv = random_tree(rng, 0, 12, 9), 2, 12, 8, 6

    def draw(*shape):
        return torch.randn(shape, generator=torch_rng)

    q, k, v = draw(1, heads, n, dk), draw(1, heads, n, dk) / 3, draw(1, heads, n, dv)
    g, beta = -draw(1, heads, n, dk).abs(), draw(1, heads, n, 1).sigmoid()
    inputs = q, k, v, g, beta, draw(1, heads, dk, dv)
    ancestors = torch.from_numpy(tree.ancestor_mask())[None]
    by_pairs = delta_rule(*inputs, TreeNodes(ancestors))
    by_depth = delta_rule(*inputs, TreeNodes(ancestors, tree.parents))
    for one, other in zip(by_pairs, by_depth, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


DELTA, MAMBA = HYBRID_FAMILIES
convolve = hybrid.HOOKS["causal_conv1d_fn"]
update_conv_state = RecurrentCache.update_conv_state


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}
    for family in HYBRID_FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        write_target(folder / "target", family, seed=TARGET_SEED, layers=2)
        ids = {"target_layer_ids": (0, 1)}
        write_drafter(folder / "drafter", folder / "target", seed=DRAFTER_SEED, **ids)
        made[family] = folder / "target", folder / "drafter"
    return made


TREE_OF_CHAINS = "None if tree is not None and tree.is_chain and len(tree) > 1 else tree"
COMMIT = Writes, "commit", "state_update(u, k, log_g)"
FAULTS = {
    "windows by column": (
        *(recurrent_states, "plan_windows", "convolution_windows(tree.parents, kernel)"),
        "np.arange(len(tree.parents))[:, None] + np.arange(kernel)",
    ),
    "a causal mask": (
        *(recurrence, "_decays", "total = ancestors"),
        "ancestors = torch.ones_like(ancestors).tril()\n    total = ancestors",
    ),
    "no decay of a node's own": (recurrence, "_decays", ".exp(), total", ".exp(), total - log_g"),
    "a commit without decays": (*COMMIT, "state_update(u, k, 0 * log_g)"),
    "a commit with decays of its own": (*COMMIT, "state_update(u, k * log_g.exp(), log_g)"),
    "a commit of the whole block": (Writes, "commit", "index_select(2, path)", "clone()"),
    "a tail of the last columns": (
        *(recurrent_states, "_tail", "inputs.index_select(2, rows[len(path) :])"),
        "inputs[:, :, -width:].clone()",
    ),
}
OF_DELTA = {
    "keys that are not normalised": (recurrence, "_products", "(x @ k.", "(2 * x @ k."),
    "values that are not corrected": (
        *(recurrence, "delta_rule", "solve_triangular(system, right,"),
        "solve_triangular(0 * system, right,",
    ),
    "chains that run as text": (CpuTarget, "run_rows", "n, tree,", f"n, {TREE_OF_CHAINS},"),
}
OF_MAMBA = {"a state that counts twice": (recurrence, "linear_rule", "* q)", "* 2 * q)")}
CHAINS_AS_TEXT = ModelPasses, "new_cache", "tree, mask)", f"{TREE_OF_CHAINS}, mask)"


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("family", "fault"),
    [
        *(pytest.param(DELTA, fault, id=name) for name, fault in (FAULTS | OF_DELTA).items()),
        *(pytest.param(MAMBA, fault, id=name) for name, fault in OF_MAMBA.items()),
        *(
            pytest.param(MAMBA, fault, id=f"{name}, {MAMBA}", marks=pytest.mark.nightly)
            for name, fault in (FAULTS | {"chains that run as text": CHAINS_AS_TEXT}).items()
        ),
    ],
)
def test_a_fault_is_refused_at_load(pairs, monkeypatch, family, fault):
    plant(monkeypatch, *fault)
    with pytest.raises(UnsupportedModelError, match="speculative output would differ"):
        load(*pairs[family], CPU)


def test_a_step_in_place_is_refused_at_load(pairs, monkeypatch):
    """Since transformers 5.25 Mamba-2 copies the state before a step; earlier versions do not."""
    name, in_place = "mamba2_scan_forward", ("recurrent_state.clone()", "recurrent_state")
    scan = hybrid.function_of_file(getattr(granite, name), vars(granite))
    plant(monkeypatch, SimpleNamespace(**{name: scan}), name, *in_place)
    load(*pairs[MAMBA], CPU)
    plant(monkeypatch, HybridCache, "get_recurrent_state", "state = state.clone()", "state")
    with pytest.raises(UnsupportedModelError, match="speculative output would differ"):
        load(*pairs[MAMBA], CPU)


def own_attention(config):
    return "eager"


def without(*names):
    """The hooks without some, as for layers whose functions have other names."""
    return {name: hook for name, hook in hybrid.HOOKS.items() if name not in names}


def convolve_a_copy(layer, original, inputs, *args, **kwargs):
    return convolve(layer, original, inputs.clone(), *args, **kwargs)


def kernel_of_unknown_size(cache, conv_states, layer_idx, **_):
    return update_conv_state(cache, conv_states, layer_idx)


def unknown_to_model(cache, layer_idx):
    raise IndexError("list index out of range")


@pytest.mark.sample(None)
@pytest.mark.parametrize(
    ("owner", "name", "unsupported", "reason"),
    [
        (hybrid, "HOOKS", {}, "their recurrent layers are of an unknown kind"),
        (hybrid, "HOOKS", without("causal_conv1d_fn"), "convolution is computed by an unsupp"),
        (
            hybrid,
            "HOOKS",
            hybrid.HOOKS | {"causal_conv1d_fn": convolve_a_copy},
            "convolution is computed by an unsupported function",
        ),
        (hybrid, "HOOKS", without("torch_chunk_gated_delta_rule"), "the recurrence of layer 0"),
        (RecurrentCache, "update_conv_state", kernel_of_unknown_size, "the convolution's kernel"),
        (
            RecurrentCache,
            "get_recurrent_states_to_keep",
            unknown_to_model,
            r"does not know these layers of transformers 5.* \(list index out of range\)$",
        ),
        (model_target, "tree_attention", own_attention, "do not support other attention functions"),
    ],
)
def test_layers_of_another_kind_are_refused_by_name(
    pairs, monkeypatch, owner, name, unsupported, reason
):
    use_models(monkeypatch)
    monkeypatch.setattr(owner, name, unsupported)
    refusal = f"^qwen3_5_text models cannot run a draft tree: .*{reason}"
    with pytest.raises(UnsupportedModelError, match=refusal):
        load(pairs[DELTA][0], None, CPU)
