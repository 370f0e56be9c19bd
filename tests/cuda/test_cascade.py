"""Attention in parts: the same as with a mask, and what models that use it compute."""

import json

import numpy as np
import pytest
from parts import load_with_parts

from treeflash.config import LoadConfig
from treeflash.decoding.interfaces import Extension
from treeflash.decoding.text_session import TextSession
from treeflash.testing import require
from treeflash.testing.models import write_target
from treeflash.testing.texts import random_tokens, random_tree

require("torch")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)
from treeflash_cuda import attention_kernels  # noqa: E402
from treeflash_cuda.attention_kernels import PlainKernels, Ranges, merge  # noqa: E402
from treeflash_cuda.backend import load  # noqa: E402
from treeflash_cuda.cascade import is_window  # noqa: E402

VOCAB = 40
CPU = LoadConfig(device="cpu", dtype="float32")


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("split", [0, 3, 11])
def test_two_parts_are_attention_over_all_keys(split):
    q, k, v = numbers(2, 3, 4, 8), numbers(16, 3, 8, seed=1), numbers(16, 3, 8, seed=2)
    ranges = Ranges(torch.tensor([0, 0], dtype=torch.int32), torch.full((2,), split))
    own = [x[split:].transpose(0, 1).expand(2, -1, -1, -1) for x in (k, v)]
    mask = torch.zeros(2, 1, 4, 16 - split)
    mask[:, :, 1, 2:] = -torch.inf
    kernels = PlainKernels()
    found = merge(
        kernels.shared(q, k, v, ranges, 0.3),
        kernels.masked(q, *own, mask, 0.3),
    )
    expected = F.scaled_dot_product_attention(
        q,
        *(x.transpose(0, 1)[None].expand(2, -1, -1, -1) for x in (k, v)),
        attn_mask=F.pad(mask, (split, 0)),
        scale=0.3,
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("empty", [torch.inf, -torch.inf])
def test_an_empty_part_counts_for_nothing(empty):
    """FlashAttention gives an infinite log-sum-exp over no key, of either sign."""
    block = numbers(2, 3), numbers(2)
    prefix = torch.zeros(2, 3), torch.full((2,), empty)
    torch.testing.assert_close(merge(prefix, block), block[0])


def test_windows_are_known():
    sliding = sliding_window_causal_mask_function(4)
    assert is_window(sliding, 4)
    assert not is_window(sliding, 5)
    assert not is_window(sliding, 3)
    assert not is_window(sliding, None)
    assert not is_window(causal_mask_function, 4)
    chunked = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    assert not is_window(chunked, 4)


@pytest.mark.parametrize("family", ["mixed", "mistral", "qwen3_moe"])
def test_models_compute_what_they_do_with_masks(tmp_path, monkeypatch, family):
    """Plain decoding, prompts in several chunks, trees; alone and in one forward pass."""
    write_target(tmp_path, "qwen3" if family == "mixed" else family, seed=1, vocab_size=VOCAB)
    if family == "mixed":
        path = tmp_path / "config.json"
        windows = {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | windows))
    backends = load(tmp_path, None, CPU), load_with_parts(monkeypatch, tmp_path)
    rng = np.random.default_rng(3)
    prompts = [random_tokens(rng, VOCAB, n) for n in (12, 3)]
    more = random_tokens(rng, VOCAB, 5)
    trees = [random_tree(rng, 7, n, VOCAB) for n in (14, 1)]
    found = []
    for backend in backends:
        texts = [TextSession(backend) for _ in prompts]
        for text, prompt in zip(texts, prompts, strict=True):
            text.extend(prompt)
        states = [text.state for text in texts]
        backend.verifier.run([Extension(state, more, None) for state in states])
        together = backend.verifier.logits(list(zip(states, trees, strict=True)))
        alone = [text.logits(tree) for text, tree in zip(texts, trees, strict=True)]
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
        found.append(np.concatenate(alone))
    np.testing.assert_allclose(*found, atol=1e-4)


class WrongKernels(PlainKernels):
    def shared(self, q, k, v, ranges, scale):
        out, lse = super().shared(q, k, v, ranges, scale)
        return out, lse + 0.5


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [(PlainKernels, ""), (WrongKernels, "differ by"), (lambda: 1 / 0, "division by zero")],
)
def test_kernels_are_checked_before_they_are_used(monkeypatch, kernels, reason):
    difference = attention_kernels._difference
    monkeypatch.setattr(attention_kernels, "FlashKernels", kernels)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        attention_kernels,
        "_difference",
        lambda kernels, device, *shape: difference(kernels, torch.device("cpu"), *shape),
    )

    class Config:
        num_attention_heads, num_key_value_heads, head_dim, hidden_size = 4, 2, 8, 32

    found, why = attention_kernels.flash_kernels(torch.device("cuda"), torch.bfloat16, Config)
    assert (found is None) == bool(reason)
    assert reason in why
