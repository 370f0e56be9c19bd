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
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from treeflash.config import cache_folder
from treeflash_mlx.metal_kernels.verdicts import KeptVerdicts, Verdict, file_of

MIN_SPEEDUP = 1.15
MAX_FAMILY = 16
"""The latest GPU family that kernels are used on, M4's. On M5 (17) none has been tried for minutes,
and others report kernels that were the fastest there when timed and stalled in generations."""
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

NOT_TIMED: Mapping[str, Candidate] = {}
VERDICTS: dict[str, dict[str, str]] = {}
"""What `choose` decided in this process and why, by kernel with its shape, and by size."""


def uses_kernels() -> bool:
    """Return whether kernels may be used on the default device."""
    if not mx.metal.is_available() or mx.default_device().type != mx.gpu:
        return False
    family = re.fullmatch(r"applegpu_g(\d+)\w*", str(mx.device_info().get("architecture")))
    return family is not None and int(family[1]) <= MAX_FAMILY


@cache
def kept_verdicts() -> KeptVerdicts:
    """Return the verdicts of earlier processes on this machine."""
    here = Path(__file__).parent
    sources = sorted([*here.glob("*.py"), here.parent / "hybrid.py"])
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
    errors: Callable[[], Sequence[float]],
    limit: float,
    kernels: Mapping[str, Candidate] = NOT_TIMED,
    *timed: Any,
    key: object = None,
    tells_bits: bool = False,
) -> str | None:
    """Decide whether a kernel is right and the fastest on this device; note it in `VERDICTS`.

    A kernel that is wrong or does not compile is left out with a warning of one line. A verdict
    after timing is kept for later processes, which neither check nor time the kernel again.

    Args:
        what: computes without the kernel, in the warning.
        shape: of the layers that would use it.
        size: the number of rows, nodes or columns of this decision.
        errors: of the kernel's results, relative.
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
    if (verdict := kept.find(name)) is not None:
        verdicts[size] = f"{verdict.text}, timed on {verdict.day}"
        return verdict.winner
    if kernels and kept.path is not None:
        announce_timing()
    try:
        found = float(np.max(errors()))  # `max` may pass over NaN
        if found <= limit:
            gains = {name: speedup(kernel, *timed) for name, kernel in kernels.items()}
            fastest = max(gains, key=gains.__getitem__, default="")
            used = gains.get(fastest, MIN_SPEEDUP) >= MIN_SPEEDUP
            text = ("" if used else "not ") + "used"
            if gains:
                text += f", {gains[fastest]:.2f} times as fast as MLX's operation"
            if len(gains) > 1:
                text += f" with {fastest}"
            if tells_bits:
                text += f", {'other' if found else 'same'} bits"
            verdicts[size], winner = text, fastest if used else None
            if gains:
                kept.keep(name, Verdict.found_now(winner, text))
            return winner
        reason = f"its relative error is {found:.1e}"
    except (RuntimeError, ValueError) as failure:
        reason = str(failure).partition("\n")[0]
    verdicts[size] = f"not used, {reason}"
    warnings.warn(f"{what} run without their Metal kernel: {reason}", stacklevel=3)
    return None


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
        x, started = start, clock()
        for call in range(calls):
            x = candidate(x, call)
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
