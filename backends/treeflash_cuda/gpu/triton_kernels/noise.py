"""The noise of drafts, and the log probabilities of a drafter's logits with it.

The noise is computed where it is needed: written out, it would take more memory than the logits,
and its hash many passes over it. Each row of logits is read twice, by several programs side by
side: once for its maximum and its sum, and once for the log probabilities.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from treeflash_cuda.gpu.triton_kernels.sampling import _noise

BLOCK = 1024
"""Tokens that a program reads at once."""
PARTS = 16
"""Programs of a row."""


@triton.jit
def _scaled_noise(row, ids, keys_pointer):
    """Compute the noise of tokens with the keys of a row, times the row's scale."""
    first_key = tl.load(keys_pointer + 3 * row)
    second_key = tl.load(keys_pointer + 3 * row + 1)
    scale = tl.load(keys_pointer + 3 * row + 2).to(tl.float32, bitcast=True)
    if scale != 0:
        noise = _noise(ids, first_key, second_key) * scale
    else:
        noise = tl.zeros_like(ids).to(tl.float32)
    return noise


@triton.jit
def _scaled_logits(
    logits_pointer,
    ids_pointer,
    keys_pointer,
    row,
    stride,
    tokens,
    vocab,
    temperature,
    NOISY: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """Load logits of a row with their noise, divided by the temperature; -inf after the last."""
    mask = tokens < vocab
    x = tl.load(logits_pointer + row * stride + tokens, mask=mask, other=float("-inf"))
    x = x.to(tl.float32)
    if NOISY:
        ids = tl.load(ids_pointer + tokens, mask=mask, other=0).to(tl.int32) if HAS_IDS else tokens
        x += _scaled_noise(row, ids, keys_pointer)
    return tl.div_rn(x, temperature)


@triton.jit
def _sum_parts(
    logits_pointer,  # (n, vocab)
    ids_pointer,  # (vocab,)
    keys_pointer,  # (n, 3)
    parts_pointer,  # (n, PARTS, 2) the maximum of each part, and the sum relative to it
    vocab,
    stride,
    temperature,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    NOISY: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(part, tl.cdiv(vocab, BLOCK), PARTS):
        x = _scaled_logits(
            *(logits_pointer, ids_pointer, keys_pointer, row, stride),
            *(block * BLOCK + tl.arange(0, BLOCK), vocab, temperature, NOISY, HAS_IDS),
        )
        new = tl.maximum(highest, x)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(highest - base) + tl.exp(x - base)
        highest = new
    best = tl.max(highest, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    place = parts_pointer + 2 * (row * PARTS + part)
    tl.store(place, best)
    tl.store(place + 1, tl.sum(total * tl.exp(highest - base), 0))


@triton.jit
def _write_log_probs(
    logits_pointer,
    ids_pointer,
    keys_pointer,
    parts_pointer,
    result_pointer,  # (n, vocab)
    vocab,
    stride,
    temperature,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    NOISY: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = parts_pointer + 2 * (row * PARTS + tl.arange(0, PARTS))
    highest, totals = tl.load(places), tl.load(places + 1)
    best = tl.max(highest, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    log_total = tl.log(tl.sum(totals * tl.exp(highest - base), 0))
    for block in range(part, tl.cdiv(vocab, BLOCK), PARTS):
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        x = _scaled_logits(
            *(logits_pointer, ids_pointer, keys_pointer, row, stride),
            *(tokens, vocab, temperature, NOISY, HAS_IDS),
        )
        tl.store(result_pointer + row * vocab + tokens, x - best - log_total, mask=tokens < vocab)


def noisy_log_probs(
    logits: Tensor, noise: Tensor, temperature: float, ids: Tensor | None = None
) -> Tensor:
    """Compute `operations.noisy_log_probs` in two launches."""
    n, vocab = logits.shape
    assert logits.stride(1) == 1
    parts = torch.empty(n, PARTS, 2, device=logits.device)
    result = torch.empty(n, vocab, device=logits.device)
    inputs = logits, ids, noise if len(noise) else None
    arguments = vocab, logits.stride(0), float(temperature)
    settings = {
        "BLOCK": min(BLOCK, triton.next_power_of_2(vocab)),
        "PARTS": PARTS,
        "NOISY": inputs[2] is not None,
        "HAS_IDS": ids is not None,
        "enable_fp_fusion": False,
    }
    _sum_parts[n, PARTS](*inputs, parts, *arguments, **settings)
    _write_log_probs[n, PARTS](*inputs, parts, result, *arguments, **settings)
    return result


@triton.jit
def _draft_noise(
    ids_pointer,  # (groups, width)
    keys_pointer,  # (n, 3)
    result_pointer,  # (n, width)
    width,
    rows,  # number of rows of a group
    BLOCK: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, ids = columns < width, columns
    if HAS_IDS:
        ids = tl.load(ids_pointer + row // rows * width + columns, mask=mask, other=0).to(tl.int32)
    noise = _scaled_noise(row, ids, keys_pointer)
    tl.store(result_pointer + row * width + columns, noise, mask=mask)


def draft_noise(noise: Tensor, tokens: Tensor | int) -> Tensor:
    """Compute `operations.draft_noise` in one launch."""
    ids = None if isinstance(tokens, int) else tokens.contiguous()
    groups, width = (1, tokens) if isinstance(tokens, int) else tokens.shape
    result = torch.empty(len(noise), width, device=noise.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    _draft_noise[len(noise), triton.cdiv(width, block)](
        *(ids, noise, result, width, len(noise) // groups),
        BLOCK=block,
        HAS_IDS=ids is not None,
        enable_fp_fusion=False,
    )
    return result
