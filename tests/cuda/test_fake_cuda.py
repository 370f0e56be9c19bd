"""The backend on CUDA devices that hold no values: devices, dtypes, layouts and captures."""

import numpy as np
import pytest

from treeflash.config import LoadConfig, SamplingConfig
from treeflash.decoding.tree import DraftTree
from treeflash.testing import require
from treeflash.testing.models import write_drafter, write_target

require("torch")

import torch  # noqa: E402
from fake_cuda import DEVICE, FakeCuda  # noqa: E402
from treeflash_cuda.backend import load  # noqa: E402

FAMILIES = ("qwen3", "llama", "mistral", "qwen2", "qwen3_moe")
DTYPES = ("bfloat16", "float32")
SAMPLINGS = (
    SamplingConfig(),
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.8, top_k=5, top_p=0.9, min_p=0.1),
    SamplingConfig(temperature=0.8, top_p=0.9),
)
PROMPT = [3, 4, 5, 6, 7]


@pytest.fixture
def cuda(monkeypatch):
    with FakeCuda(monkeypatch) as mode:
        yield mode


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pairs by family of the target."""
    folder = tmp_path_factory.mktemp("pairs")
    for family in FAMILIES:
        write_target(folder / family, family, seed=1, vocab_size=40)
        window = 4 if family == "mistral" else None
        write_drafter(folder / f"{family}-drafter", folder / family, seed=2, sliding_window=window)
    return {family: (folder / family, folder / f"{family}-drafter") for family in FAMILIES}


@pytest.fixture(params=DTYPES)
def backend(request, folders, cuda):
    return load(*folders["qwen3"], LoadConfig(dtype=request.param))


def tree():
    parents = np.array([-1, 0, 0, 1, 1, 2], np.int32)
    depths = np.array([0, 1, 1, 2, 2, 2], np.int32)
    return DraftTree(np.arange(6, dtype=np.int32), parents, depths, np.zeros(6))


def test_mixing_devices_raises(cuda):
    with pytest.raises(RuntimeError, match=r"found (at least )?two different devices|device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


def test_mixing_dtypes_raises(cuda):
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ones(3, 3, device=DEVICE) @ torch.ones(3, 3, device=DEVICE).half()


def test_numpy_of_a_device_tensor_raises(cuda):
    with pytest.raises(TypeError, match="cuda:0 tensors cannot be converted"):
        torch.ones(3, device=DEVICE).numpy()
    assert torch.ones(3, device=DEVICE).cpu().numpy().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to(DEVICE),
        lambda x: x[x > 0],
    ],
)
def test_moving_data_during_a_capture_raises(cuda, move):
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(Exception, match=r"during a capture|nonzero"), torch.cuda.graph(None):
        move(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_verify_commit_and_draft(cuda, folders, family, dtype):
    backend = load(*folders[family], LoadConfig(dtype=dtype))
    verifier, drafter = backend.verifier(features=True), backend.drafter()
    assert backend.device == "cuda:0"
    root, features = verifier.prefill(PROMPT, SAMPLINGS[0], None)
    assert features.shape == (len(PROMPT), 32)
    for path in ([0, 1, 3], [0, 2], [0]):  # a gather, and rows that are in place
        block = drafter.draft(features, root)
        assert (block.hidden.device, block.hidden.dtype) == (DEVICE, backend.target.dtype)
        assert verifier.verify(tree(), SAMPLINGS[0], None).shape == (6,)
        features = verifier.commit(np.array(path, np.int32))
        assert (features.device, len(features)) == (DEVICE, len(path))
    drafter.extend(features)
    drafter.draft(features, root)
    assert verifier.keys_values().shape[3] == verifier.length == len(PROMPT) + 6
    verifier.close()


def test_a_long_prompt_is_prefilled_in_chunks(backend):
    verifier = backend.verifier(features=True)
    _, features = verifier.prefill([3] * 4000, SAMPLINGS[0], None)
    assert features.shape == (4000, 32)


@pytest.mark.parametrize("shortlist", [None, 16])
@pytest.mark.parametrize("rows", [None, 7])
def test_tables(backend, shortlist, rows):
    verifier, drafter = backend.verifier(features=True), backend.drafter()
    root, features = verifier.prefill(PROMPT, SAMPLINGS[0], None)
    block = drafter.draft(features, root)
    table = backend.head.transitions(block, 4, 8, 0.7, shortlist=shortlist, rows=rows)
    assert table.tokens.shape == (5, 4, 8)
    assert drafter.marginals(block, 8, 0.7).tokens.shape == (5, 1, 8)
    assert drafter.log_probs(block).shape == (5, 40)
    assert backend.head.log_probs(block, np.ones(5, np.int32)).shape == (5, 40)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: repr(s)[15:-1])
def test_choices(backend, sampling):
    verifier = backend.verifier(features=False)
    verifier.prefill(PROMPT, sampling, np.array([0.5]))
    chosen = verifier.verify(tree(), sampling, np.full(6, 0.5))
    assert chosen.dtype == np.int32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_trees_are_captured(cuda, folders, family, dtype):
    backend = load(*folders[family], LoadConfig(dtype=dtype, cuda_graphs=True))
    verifier = backend.verifier(features=True)
    root, features = verifier.prefill(PROMPT, SAMPLINGS[0], None)
    backend.drafter().draft(features, root)
    for _ in range(2):  # captured, then replayed
        verifier.verify(tree(), SAMPLINGS[0], None)
        verifier.commit(np.array([0, 2], np.int32))
    (forward,) = verifier.cache.forwards.values()
    assert forward.graph is not None
