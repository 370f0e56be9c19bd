"""Temperature, filters, noise and argmax of rows of logits, each row with its own settings.

The idea: a filter keeps the tokens from some logit on, so it is enough to find that logit. It is
found digit by digit, from the highest on, as an integer in the order of the logits: a digit is the
largest one above which there is still enough, k tokens for top-k and a share of the mass for top-p.
Every step reads the row, which stays in the caches, and tries all 16 digits at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from treeflash.decoding.sampling import MAX_SHARE, MULTIPLIERS, SHIFTS

BLOCK = 1024
"""Tokens that a program reads at once."""
FIRST_SHIFT, SECOND_SHIFT, THIRD_SHIFT = map(tl.constexpr, SHIFTS)
# The multipliers are int32 numbers, whose products wrap.
FIRST, SECOND = (tl.constexpr(x - (x >> 31 << 32)) for x in MULTIPLIERS)
LARGEST_SHARE = tl.constexpr(MAX_SHARE)
SIGN, OTHERS = map(tl.constexpr, (-(2**31), 2**31 - 1))
DIGIT_BITS = 4
DIGITS = tl.constexpr(1 << DIGIT_BITS)
"""Thresholds of a step: with more, a program would need more registers than there are."""


@triton.jit
def _load(row, block, vocab, BLOCK: tl.constexpr):
    """Load a block's logits, and their places; -inf beyond the last one."""
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(row + tokens, mask=tokens < vocab, other=float("-inf")).to(tl.float32)
    return x + 0.0, tokens  # -0 and 0 are equal


@triton.jit
def _ordered(x):
    """Return int32 numbers in the order of float32 ones."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ OTHERS, bits)


@triton.jit
def _shifted(x, SHIFT: tl.constexpr):
    """Return the right shift of unsigned numbers: the sign is not copied."""
    return (x >> SHIFT) & (OTHERS >> (SHIFT - 1))


@triton.jit
def _mixed(x):
    x = (x ^ _shifted(x, FIRST_SHIFT)) * FIRST
    x = (x ^ _shifted(x, SECOND_SHIFT)) * SECOND
    return x ^ _shifted(x, THIRD_SHIFT)


@triton.jit
def _noise(tokens, first_key, second_key):
    """Compute `treeflash.decoding.sampling.gumbel`."""
    x = _mixed(_mixed(tokens ^ first_key) ^ second_key)
    share = (_shifted(x, 1).to(tl.float32) + 0.5) * (1.0 / 2147483648.0)
    share = tl.minimum(share, LARGEST_SHARE)
    # The quotient takes back the error of log(1 - share) for small shares.
    rest = 1.0 - share
    exact = tl.log(rest) * (share / tl.maximum(1.0 - rest, 1e-30))
    return -tl.log(-tl.where(rest == 1.0, -share, exact))


@triton.jit
def _largest_digit(enough):
    """Return the largest digit above which there is enough, as above every smaller one; or 0."""
    return tl.maximum(tl.sum(enough.to(tl.int32), 0) - 1, 0)


@triton.jit
def _sample(
    logits_pointer,  # (n, vocab)
    keys_pointer,  # (n, 2)
    settings_pointer,  # (n, 4) temperature, top-k, top-p and min-p of each row
    tokens_pointer,  # (n,)
    vocab,
    stride,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,  # digits in which float32 numbers from logits differ
    DIGIT_BITS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row, blocks = logits_pointer + index * stride, tl.cdiv(vocab, BLOCK)
    temperature = tl.load(settings_pointer + 4 * index)
    top_k = tl.load(settings_pointer + 4 * index + 1)
    top_p = tl.load(settings_pointer + 4 * index + 2)
    min_p = tl.load(settings_pointer + 4 * index + 3)
    greedy = temperature == 0
    divisor, least = tl.where(greedy, 1.0, temperature), tl.where(greedy, 0.0, min_p)

    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    invalid = tl.zeros((BLOCK,), tl.int32)
    for block in range(blocks):
        x, tokens = _load(row, block, vocab, BLOCK)
        highest = tl.maximum(highest, x)
        invalid |= (x != x).to(tl.int32)
    best = tl.max(highest, 0)
    is_finite = (tl.max(invalid, 0) == 0) & (tl.abs(best) < float("inf"))
    best = tl.where(is_finite, best, 0.0)

    digits = tl.arange(0, DIGITS)
    edge = tl.full((), SIGN, tl.int32)
    if (top_k > 0) & (top_k < vocab) & (temperature > 0):
        for step in range(STEPS):
            shift = 32 - DIGIT_BITS * (step + 1)
            above = edge ^ (digits << shift)
            count = tl.zeros((DIGITS, BLOCK), tl.int32)
            for block in range(blocks):
                x, tokens = _load(row, block, vocab, BLOCK)
                order = tl.where(tokens < vocab, _ordered(x), SIGN)
                count += (order[None, :] >= above[:, None]).to(tl.int32)
            enough = tl.sum(count, 1).to(tl.float32) >= top_k
            edge ^= _largest_digit(enough) << shift
    if (top_p < 1) & (temperature > 0):
        floor = edge
        mass = tl.zeros((BLOCK,), tl.float32)
        for block in range(blocks):
            x, tokens = _load(row, block, vocab, BLOCK)
            share = tl.exp((x - best) / divisor)
            mass += tl.where(_ordered(x) >= floor, share, 0.0)
        needed = top_p * tl.sum(mass, 0)
        nucleus = tl.full((), SIGN, tl.int32)
        for step in range(STEPS):
            shift = 32 - DIGIT_BITS * (step + 1)
            above = nucleus ^ (digits << shift)
            masses = tl.zeros((DIGITS, BLOCK), tl.float32)
            for block in range(blocks):
                x, tokens = _load(row, block, vocab, BLOCK)
                order = _ordered(x)
                share = tl.where(order >= floor, tl.exp((x - best) / divisor), 0.0)
                masses += tl.where(order[None, :] >= above[:, None], share[None, :], 0.0)
            nucleus ^= _largest_digit(tl.sum(masses, 1) >= needed) << shift
        edge = tl.maximum(edge, nucleus)
    # The best token stays, even if the mass to keep rounds to 0.
    edge = tl.minimum(edge, _ordered(best))

    first_key = tl.load(keys_pointer + 2 * index)
    second_key = tl.load(keys_pointer + 2 * index + 1)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    chosen = tl.zeros((BLOCK,), tl.int32)
    for block in range(blocks):
        x, tokens = _load(row, block, vocab, BLOCK)
        score = (x - best) / divisor
        kept = (_ordered(x) >= edge) & (tl.exp(score) >= least) & (tokens < vocab)
        noise = tl.where(greedy, 0.0, _noise(tokens, first_key, second_key))
        score = tl.where(kept, score + noise, float("-inf"))
        chosen = tl.where(score > highest, tokens, chosen)
        highest = tl.maximum(highest, score)
    winners = tl.where(highest == tl.max(highest, 0), chosen, vocab)
    token = tl.where(is_finite, tl.min(winners, 0), -1)
    tl.store(tokens_pointer + index, token)


def sample_rows(logits: Tensor, keys: Tensor, settings: Tensor) -> Tensor:
    """Compute `operations.sample_rows` in one launch."""
    n, vocab = logits.shape
    assert logits.stride(1) == 1
    tokens = torch.empty(n, dtype=torch.int32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(vocab))
    _sample[n,](
        *(logits, keys, settings, tokens, vocab, logits.stride(0)),
        BLOCK=block,
        STEPS=(16 if logits.dtype == torch.bfloat16 else 32) // DIGIT_BITS,
        DIGIT_BITS=DIGIT_BITS,
        enable_fp_fusion=False,
        num_warps=16,  # fewer warps spill a register on some GPUs
    )
    return tokens
