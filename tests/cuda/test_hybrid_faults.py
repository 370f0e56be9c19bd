"""Faults of recurrent layers on trees, each of which the check at load refuses."""

from dataclasses import replace

import numpy as np
import pytest
from parts import use_models

from treeflash.config import LoadConfig
from treeflash.errors import UnsupportedModelError
from treeflash.testing import HYBRID_FAMILIES, require, write_drafter, write_target
from treeflash.testing.pairs import DRAFTER_SEED, TARGET_SEED

require("torch")

import torch
from treeflash_cuda import recurrence, recurrent_states
from treeflash_cuda.backend import load
from treeflash_cuda.cpu import decoder_target
from treeflash_cuda.hf import hybrid, model_target
from treeflash_cuda.hf.hybrid import MATRIX, HybridCache, RecurrentCache
from treeflash_cuda.recurrent_states import SequenceRows, Writes

DELTA, MAMBA = HYBRID_FAMILIES
commit = Writes.commit
update_conv_state = RecurrentCache.update_conv_state
decays = recurrence._decays
delta_rule, linear_rule = recurrence.delta_rule, recurrence.linear_rule
products = recurrence._products


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


def windows_by_column(parents, kernel):
    return np.arange(len(parents))[:, None] + np.arange(kernel)


def causal_mask(log_g, ancestors):
    return decays(log_g, torch.ones_like(ancestors).tril())


def own_decay_left_out(log_g, ancestors):
    pairs, _ = decays(log_g, ancestors)
    _, total = decays(log_g, ancestors & ~torch.eye(ancestors.shape[-1], dtype=torch.bool))
    return pairs, total


def keys_not_normalised(x, k, pairs):
    return products(x, 2 * k, pairs)


def queries_scaled(q, *args):
    return linear_rule(2 * q, *args)


def no_solve(system, right, **_):
    """What nodes write is not corrected by what their ancestors write."""
    return right


def commit_without_decay(writes, path):
    return commit(replace(writes, log_g=torch.zeros_like(writes.log_g)), path)


def commit_with_own_decay(writes, path):
    return commit(replace(writes, k=writes.k * torch.exp(writes.log_g)), path)


def state_of_the_whole_block(writes, path):
    return commit(writes, torch.arange(writes.u.shape[2]))


def tail_of_the_last_columns(inputs, path, width):
    return inputs[:, :, -width:].clone()


def chains_run_as_text(states, first, count, tree, ancestors):
    is_text = tree is not None and tree.is_chain and count > 1
    return SequenceRows(states, first, count, None if is_text else tree, ancestors)


def single_step_in_place(cache, layer_idx, state_idx=0):
    states = cache.parts[0].states
    return states.committed.get((MATRIX, layer_idx, state_idx)) if cache.is_step else None


PLACES = {
    windows_by_column: (recurrent_states, "convolution_windows"),
    causal_mask: (recurrence, "_decays"),
    own_decay_left_out: (recurrence, "_decays"),
    keys_not_normalised: (recurrence, "_products"),
    queries_scaled: (recurrence, "linear_rule"),
    no_solve: (torch.linalg, "solve_triangular"),
    commit_without_decay: (Writes, "commit"),
    commit_with_own_decay: (Writes, "commit"),
    state_of_the_whole_block: (Writes, "commit"),
    tail_of_the_last_columns: (recurrent_states, "_tail"),
    chains_run_as_text: (None, "SequenceRows"),
    single_step_in_place: (HybridCache, "get_recurrent_state"),
}
OF_DELTA, OF_MAMBA = {keys_not_normalised, no_solve}, {queries_scaled, single_step_in_place}
FAULTS = [
    *((fault, DELTA) for fault in PLACES if fault not in OF_MAMBA),
    *((fault, MAMBA) for fault in PLACES if fault in OF_MAMBA),
    *(
        pytest.param(fault, MAMBA, marks=pytest.mark.nightly)
        for fault in PLACES
        if fault not in OF_DELTA | OF_MAMBA
    ),
]


def names(value):
    return value if isinstance(value, str) else value.__name__


@pytest.mark.parametrize(("fault", "family"), FAULTS, ids=names)
def test_a_fault_is_refused_at_load(pairs, monkeypatch, fault, family):
    owner, name = PLACES[fault]
    if owner is None:  # where passes of layers of our own begin, or of transformers' models
        owner = decoder_target if family == DELTA else model_target
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(UnsupportedModelError, match="speculative output would differ"):
        load(*pairs[family], LoadConfig(device="cpu", dtype="float32"))


def own_attention(config):
    return "eager"


def without(*names):
    """The hooks without some, as for layers whose functions have other names."""
    return {name: hook for name, hook in hybrid.HOOKS.items() if name not in names}


def convolve_a_copy(layer, original, inputs, *args, **kwargs):
    return hybrid._convolution(layer, original, inputs.clone(), *args, **kwargs)


def kernel_of_unknown_size(cache, conv_states, layer_idx, **_):
    return update_conv_state(cache, conv_states, layer_idx)


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
        load(pairs[DELTA][0], None, LoadConfig(device="cpu", dtype="float32"))
