"""The suite on real accelerators, CUDA and Metal, in float32; and what half precision meets."""

from dataclasses import replace

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.testing import BackendSuite, require, write_drafter, write_target


def load_cuda(target, drafter, config):
    require("torch")
    import torch
    from treeflash_cuda.backend import load

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return load(target, drafter, config)


@pytest.mark.device
class TestCuda(BackendSuite):
    @pytest.fixture
    def load(self):
        return lambda target, drafter, config: load_cuda(
            target, drafter, replace(config, cuda_graphs=False)
        )


@pytest.mark.device
class TestCudaGraphs(BackendSuite):
    """In float32 only drafts' heads and the choice of tokens are captured."""

    @pytest.fixture
    def load(self):
        return load_cuda


@pytest.mark.device
@pytest.mark.parametrize("family", ["qwen3", "mistral"])  # the latter has a sliding window
def test_the_operation_computes_what_a_mask_does(tmp_path, family):
    write_target(tmp_path, family, seed=1)
    found = []
    for with_operations in (True, False):
        backend = load_cuda(tmp_path, None, LoadConfig(dtype="bfloat16"))
        assert backend.target.operations is not None
        if not with_operations:
            backend.verifier._has_tree_pass = False
            backend.target.kernels = None
        text = SequenceSession(backend)
        text.extend([3, 4, 5] * 400)
        parents = np.array([-1, 0, 0, 1, 1, 2], np.int32)
        depths = np.array([0, 1, 1, 2, 2, 2], np.int32)
        tree = DraftTree(np.arange(6, dtype=np.int32), parents, depths, np.zeros(6))
        found.append(text.logits(tree))
    np.testing.assert_allclose(*found, atol=0.05 * float(found[0].std()))


@pytest.mark.device
@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=0.8, top_p=0.9)])
def test_graphs_in_bfloat16_compute_what_no_graph_does(tmp_path, sampling):
    """Beyond the columns that attention covers at least too."""
    write_target(tmp_path / "target", "qwen3", seed=1)
    write_drafter(tmp_path / "drafter", tmp_path / "target", seed=2)
    found = []
    for with_graphs in (False, True):
        load = LoadConfig(dtype="bfloat16", cuda_graphs=with_graphs)
        backend = load_cuda(tmp_path / "target", tmp_path / "drafter", load)
        config = DecodeConfig(budget=16, max_tokens=600, sampling=sampling)
        tokens = [token for step in decode(backend, [3, 4, 5], config) for token in step.tokens]
        assert len(tokens) == 600
        text = SequenceSession(backend)
        text.extend([3, 4, 5] * 200)
        tree = DraftTree.chain(np.arange(6, dtype=np.int32), np.zeros(6))
        found.append(text.logits(tree))
    np.testing.assert_allclose(*found, atol=0.05 * float(found[0].std()))


@pytest.mark.device
class TestMetal(BackendSuite):
    @pytest.fixture
    def load(self):
        require("mlx.core")
        import mlx.core as mx
        from treeflash_mlx.backend import load

        if not mx.metal.is_available():
            pytest.skip("needs Metal")
        return load
