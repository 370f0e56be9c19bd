"""Layers on several devices: their keys and values, and what moves between them.

The devices themselves are fake ones, in `test_fake_cuda.py`; here values are compared.
"""

import numpy as np
import pytest
from parts import use_models

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.session import SequenceSession
from treeflash.errors import ConfigError
from treeflash.testing import require
from treeflash.testing.comparisons import random_tokens
from treeflash.testing.models import write_pair, write_target

require("torch")

import torch
from transformers import AutoModelForCausalLM
from treeflash_cuda import backend as backend_module
from treeflash_cuda import target_loading
from treeflash_cuda.backend import load
from treeflash_cuda.cache import Arena
from treeflash_cuda.hf.model_target import follow_devices
from treeflash_cuda.operations import Operations

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
    monkeypatch.setattr(torch.cuda, "get_device_name", names.get)

    def load(shapes, device, dtype):
        checked.append(device)
        reasons = {} if names[device] == "A100" else {"gated": "ptxas is missing"}
        return Operations(rms_norm=triton, gated=triton).without(reasons)

    def triton(*_):
        raise NotImplementedError

    monkeypatch.setattr(target_loading, "load_operations", load)
    with pytest.warns(UserWarning, match="on cuda:1, L4, gated runs in PyTorch: ptxas is missing"):
        found = target_loading.load_target_operations(None, gpus, torch.bfloat16)
    assert checked == gpus[:2]
    assert found.rms_norm is triton
    assert found.gated is Operations().gated
    assert found.reasons == {"gated": "on cuda:1, L4, ptxas is missing"}


@pytest.fixture
def _placed_on_the_cpu(monkeypatch):
    for module in (backend_module, target_loading):
        monkeypatch.setattr(module, "choose_device", lambda name: CPU)


@pytest.mark.usefixtures("_placed_on_the_cpu")
def test_layers_outside_of_gpus_are_refused(pair):
    """Accelerate places a model that does not fit on the CPU."""
    with pytest.raises(ConfigError, match="does not fit into the GPUs"):
        load(*pair, LoadConfig(device_map="auto"))


@pytest.mark.usefixtures("_placed_on_the_cpu")
def test_recurrent_layers_are_refused(tmp_path):
    write_target(tmp_path, "qwen3_5", seed=1)
    with pytest.raises(ConfigError, match="not supported for models with recurrent layers"):
        load(tmp_path, None, LoadConfig(device_map="auto"))


def test_a_model_of_transformers_on_several_devices_is_refused(pair):
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    model.lm_head.to("meta")
    with pytest.raises(ConfigError, match="the model is on several devices; load it on one"):
        backend_module.wrap(model, None)
