"""Metal kernels in the place of MLX's operations, and how they are chosen at load.

A kernel is used on a device only if its results there equal the operations' results, and if it is
faster there: `choose` decides both, for one kernel and one shape. What is timed are chains of
calls, each of which waits for the one before, as layers do. M1 and M2 allow some kernels only 448
threads in a threadgroup, and no kernel here has more.

Kernels are written for `mx.fast.metal_kernel`, so they are bodies of functions in Metal's language,
for which MLX writes the signature. `python -m benchmarks.metal_sources` prints them.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx

from treeflash.config import cache_folder
from treeflash.errors import first_line
from treeflash_mlx.metal_kernels.verdicts import KeptVerdicts, Verdict, file_of

MIN_SPEEDUP = 1.15
MAX_FAMILY = 16
"""The latest GPU family on which kernels that multiply matrices are used, M4's. On M5 (17) none has
been tried for minutes, and others report such kernels that were the fastest there when timed and
stalled in generations. mlx-lm itself runs kernels like the ones of recurrent layers there."""
UNTRIED = "TREEFLASH_UNTRIED_KERNELS"
"""The variable of the environment that lets volunteers use them on later families, too."""
CALLS = 20
"""Calls of a chain."""
ROUNDS = 3
"""Chains of each candidate that are timed; the fastest counts."""
LONG_BYTES, LONG_CALLS, LONG_ROUNDS = 64 << 20, 5, 2
"""With this number of bytes of weights a call takes milliseconds, so that few calls are enough: the
full number would take seconds for an output head on an M1."""
ROUNDING = {mx.float32: 1e-5, mx.float16: 5e-3, mx.bfloat16: 4e-2}
"""Relative errors that rounding explains, by the dtype of results."""

UNROLL = '#define UNROLL _Pragma("clang loop unroll(full)")\n'
"""Comes before every kernel. Without the pragma a compiler may keep a loop over registers, whose
arrays then lie in the memory of the thread."""

Candidate: TypeAlias = Callable[[mx.array, int], mx.array]
"""An implementation that is timed, as a call of a chain: it gets what the call before returned, and
the number of the call."""

Errors: TypeAlias = Callable[[str], Mapping[str, float]]
"""Measures relative errors of a variant of a kernel, by what was computed."""

TIMED_ELSEWHERE = ("group_attention.py", "hybrid.py", "shared_products.py")
"""Files outside of this folder that have what is timed: a kernel, a share, or a kernel's rival."""

NOT_TIMED: Mapping[str, Candidate] = {}
VERDICTS: dict[str, dict[str, str]] = {}
"""What `choose` decided in this process and why, by kernel with its shape, and by size."""
MESSAGES: dict[str, str] = {}
"""Whole messages of MLX and of Apple's compiler about kernels that did not run, by kernel with its
shape, size and variant."""
MIN_ELEMENTS = 8
"""MLX passes arrays with fewer elements in another address space, which makes another kernel."""


def runs_kernels() -> bool:
    """Return whether the default device runs Metal kernels."""
    return bool(mx.metal.is_available() and mx.default_device().type == mx.gpu)


def runs_matrix_kernels() -> bool:
    """Return whether kernels that multiply matrices may be used on the default device."""
    if not runs_kernels():
        return False
    family = re.fullmatch(r"applegpu_g(\d+)\w*", str(mx.device_info().get("architecture")))
    tried = family is not None and int(family[1]) <= MAX_FAMILY
    return tried or os.environ.get(UNTRIED, "") not in ("", "0")


def padded(x: mx.array) -> mx.array:
    """Return a small array with zeros after its elements, so that all sizes run one kernel.

    Only its first axis grows: the elements keep their places.
    """
    if x.size >= MIN_ELEMENTS:
        return x
    row = x.size // x.shape[0]
    missing = -(-MIN_ELEMENTS // row) - x.shape[0]
    return mx.concatenate([x, mx.zeros((missing, *x.shape[1:]), x.dtype)])


@cache
def kept_verdicts() -> KeptVerdicts:
    """Return the verdicts of earlier processes on this machine."""
    here = Path(__file__).parent
    sources = sorted([*here.glob("*.py"), *(here.parent / name for name in TIMED_ELSEWHERE)])
    return KeptVerdicts(file_of(cache_folder() / "kernels", sources))


@cache
def announce_timing() -> None:
    """Say why loading takes longer than usual, once in a process."""
    logging.getLogger(__name__).warning(
        "timing Metal kernels and MLX's operations, once on this machine for each shape of layers"
    )


def make_kernel(
    name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, *, copies: bool = True
) -> Any:
    """Create a kernel of `mx.fast.metal_kernel` once.

    Inputs that are not contiguous are copied before each call, or come with their strides if the
    kernel is one that does not need `copies`.
    """
    return _make(mx.fast.metal_kernel, name, tuple(inputs), tuple(outputs), source, copies)


@lru_cache(64)
def _make(
    factory: Callable[..., Any],
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    source: str,
    copies: bool,
) -> Any:
    return factory(
        f"treeflash_{name}", inputs, outputs, source, UNROLL, ensure_row_contiguous=copies
    )


def choose(
    what: str,
    shape: str,
    size: str,
    errors: Errors,
    limit: float,
    kernels: Mapping[str, Candidate] = NOT_TIMED,
    *timed: Any,
    key: object = None,
    tells_bits: bool = False,
) -> str | None:
    """Decide whether a kernel is right and the fastest on this device; note it in `VERDICTS`.

    A kernel that is wrong or does not compile is left out with a warning of one line, and so is a
    variant of it while others go on. A verdict after timing is kept for later processes, which
    check only the variant that won, and time none.

    Args:
        what: computes without the kernel, in the warning.
        shape: of the layers that would use it.
        size: the number of rows, nodes or columns of this decision.
        errors: of the results of a variant, whose name is empty if there is only one.
        limit: of the errors.
        kernels: a call of each variant of the kernel, by its name; a kernel without them is not
            timed.
        timed: the other arguments of `speedup`.
        key: what tells the shape from all others, for verdicts that are kept.
        tells_bits: whether the note says if the results have the same bits.

    Returns:
        The name of the fastest variant; None if the kernel is not used.
    """
    verdicts, kept = VERDICTS.setdefault(f"{what}, {shape}", {}), kept_verdicts()
    name = repr((what, key, size))
    names: Iterable[str] = kernels or ("",)
    if (verdict := kept.find(name)) is not None:
        names = () if verdict.winner is None else (verdict.winner,)
    elif kernels and kept.path is not None:
        announce_timing()
    reasons: dict[str, str] = {}  # why variants are left out
    gains: dict[str, float] = {}
    worst = 0.0
    for variant in names:
        try:
            case, error = largest(errors(variant))
            if not error <= limit:
                reasons[variant] = f"its relative error is {error:.1e}{case and f' ({case})'}"
                continue
            if kernels and verdict is None:
                gains[variant] = speedup(kernels[variant], *timed)
            worst = max(worst, error)
        except (RuntimeError, ValueError) as failure:
            reasons[variant] = reason_of(failure)
            MESSAGES[", ".join(filter(None, (what, shape, size, variant)))] = str(failure)
    if verdict is not None and not reasons:
        verdicts[size] = f"{verdict.text}, timed on {verdict.day}"
        return verdict.winner
    if verdict is not None or len(reasons) == len(kernels or ("",)):
        variant, reason = next(iter(reasons.items()))
        reason += variant and f" with {variant}"
        verdicts[size] = f"not used, {reason}"
        warnings.warn(f"{what} run without their Metal kernel: {reason}", stacklevel=3)
        return None
    for variant, reason in reasons.items():
        warnings.warn(f"{what} never run with {variant}: {reason}", stacklevel=3)
    fastest = max(gains, key=gains.__getitem__, default="")
    winner = fastest if gains.get(fastest, MIN_SPEEDUP) >= MIN_SPEEDUP else None
    text = "not used" if winner is None else "used"
    if gains:
        text += f", {gains[fastest]:.2f} times as fast as MLX's operation"
    if len(kernels) > 1:
        text += f" with {fastest}"
    if tells_bits:
        text += f", {'other' if worst else 'same'} bits"
    text += "".join(f"; not with {variant}, {reason}" for variant, reason in reasons.items())
    verdicts[size] = text
    if gains:
        kept.keep(name, Verdict.found_now(winner, text))
    return winner


def largest(errors: Mapping[str, float]) -> tuple[str, float]:
    """Return the largest error and what has it; NaN is larger than all numbers."""
    return max(errors.items(), key=lambda item: (math.isnan(item[1]), item[1]))


def reason_of(failure: Exception) -> str:
    """Return the line of a message that says why a kernel does not run: a compiler's first error.

    MLX puts a line of its own before the compiler's message.
    """
    lines = (line.strip() for line in str(failure).splitlines())
    return next((line for line in lines if "error:" in line), first_line(failure))


def summary() -> str:
    """Say in one line in how many shapes of layers each kernel is used."""
    used: dict[str, list[bool]] = {}
    for name, verdicts in VERDICTS.items():
        wins = any(verdict.startswith("used") for verdict in verdicts.values())
        used.setdefault(name.partition(",")[0], []).append(wins)
    return "; ".join(f"{x} in {sum(wins)} of {len(wins)} shapes" for x, wins in used.items())


def speedup(
    kernel: Candidate,
    plain: Candidate,
    start: mx.array,
    nbytes: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return how many times as fast a chain of calls is with a kernel as with operations.

    Args:
        kernel: a call of the kernel.
        plain: a call of the operations.
        start: what the first call gets.
        nbytes: that a call reads.
        clock: seconds.
    """
    calls, rounds = (LONG_CALLS, LONG_ROUNDS) if nbytes >= LONG_BYTES else (CALLS, ROUNDS)

    def seconds(candidate: Candidate) -> float:
        x = start
        for call in range(calls):
            x = candidate(x, call)
        started = clock()  # in a pass Python builds later layers while the device computes
        mx.eval(x)
        return clock() - started

    seconds(kernel), seconds(plain)  # compiles
    times = [(seconds(plain), seconds(kernel)) for _ in range(rounds)]
    return min(slow for slow, _ in times) / min(fast for _, fast in times)


def relative_error(found: mx.array, expected: mx.array) -> float:
    """Measure the root mean square of the difference, relative to the one of the expected."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    error: Any = mx.sqrt(mx.mean((found - expected) ** 2) / mx.mean(expected**2)).item()
    return float(error)
