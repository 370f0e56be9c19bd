"""Compile all Triton kernels for GPUs that need not be there, and print what they take.

    python -m benchmarks.kernels [--capability 90] [--json FILE]

Kernels are compiled by the calls that launch them, with tensors of the shapes of real models. They
are listed with the bytes of shared memory of a program, the registers of a thread, and the bytes of
registers that a thread has to spill to memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, cast

import torch
import triton
from rich.progress import track
from treeflash_cuda.cache import quantise
from treeflash_cuda.gpu.triton_kernels import (
    attention,
    convolution,
    experts,
    layers,
    moves,
    noise,
    products,
    recurrence,
    sampling,
)
from treeflash_cuda.quantised_weights import BITS, GROUP, QuantisedWeight
from treeflash_cuda.recurrence import PATH_COLUMNS, TreeNodes
from treeflash_cuda.visible_keys import SharedWork, VisibleKeys
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.common import Parser, Row, command, integer, publish
from treeflash.errors import ConfigError

SHARED_MEMORY = {
    **{75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10},
    **{90: 227 << 10, 100: 227 << 10, 120: 99 << 10},
}
"""Bytes that a program may have, by compute capability (NVIDIA's CUDA programming guide)."""
FIRST_BFLOAT16 = 80
"""The compute capability from which on GPUs have bfloat16; others run such models in float16."""
SHAPES = {
    "qwen3-8b": (32, 8, 128, 4096, torch.bfloat16),
    "llama-3.2-1b": (32, 8, 64, 2048, torch.float16),
    "gemma-2-9b": (16, 8, 256, 3584, torch.bfloat16),
    "qwen3-8b in float32": (32, 8, 128, 4096, torch.float32),
}
"""Heads, key heads, width of a head, hidden size, dtype."""
RECURRENT = {"qwen3-next": (32, 16, 128, 128, True), "granite-4.0-h": (48, 1, 128, 64, False)}
"""Heads, key heads, key_dim, value_dim of recurrent layers, and whether they have the delta rule.
They are measured beside every model."""
CONVOLUTIONS = (8192, 4, "silu"), (2048, 3, None)
"""Channels, kernel and activation of the convolutions of Qwen3-Next and LFM2, likewise."""


class CompileOnly:
    """A driver of Triton whose launches compile for a device, and run nothing.

    It has what compiling asks a driver for.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.cubins: list[tuple[str, bytes, int]] = []  # name, program, and bytes of shared memory
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Return a number for each architecture: Triton keeps compiled kernels by device."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}  # the table tells which kernels need too much

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.cubins.append((name, kernel, shared))
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None


def launch_all(heads: int, kv_heads: int, head_dim: int, hidden: int, dtype: torch.dtype) -> None:
    """Launch every kernel for a model."""

    def numbers(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of)

    int32 = torch.int32
    caches = numbers(2, kv_heads, 256, head_dim), quantise(numbers(2, kv_heads, 256, head_dim))
    row = numbers(64, of=int32)
    work = SharedWork(numbers(512, 3, of=int32), numbers(1, of=int32), row)
    keys = VisibleKeys(row, row, row, row, row, numbers(64, 64, of=int32), work)
    for (k, v), softcap, sinks in (
        *((cache, None, None) for cache in caches),
        (caches[0], 50.0, numbers(heads)),
    ):
        attention.tree_attention(
            *(numbers(64, heads, head_dim), k, v, keys),
            scale=head_dim**-0.5,
            softcap=softcap,
            sinks=sinks,
        )
    x, gate = numbers(64, hidden), numbers(64, 4 * hidden)
    layers.rms_norm(x, x[0], 1e-6, x)
    layers.gated(gate, gate)
    moves.move_columns(numbers(2, 2, 2, 8, head_dim), *(numbers(4, of=int32) for _ in range(3)))
    products.linear(x, numbers(4 * hidden, hidden), gate[0])
    groups, width = hidden // GROUP, 64  # sums in several parts
    for bits in BITS:
        quantised = QuantisedWeight(
            numbers(groups, width, GROUP * bits // 8, of=torch.uint8),
            *(numbers(groups, width), numbers(groups, width)),
        )
        for rows in (x, x[:32], x[:1]):
            products.quantised_linear(rows, quantised)
    sums = numbers(64, 3, of=int32)
    for added, ids in ((sums[:0], None), (sums, None), (sums, numbers(hidden, of=torch.int64))):
        noise.noisy_log_probs(x, added, 1.0, ids)
    for tokens in (hidden, numbers(4, 1024, of=torch.int64)):
        noise.draft_noise(sums, tokens)
    sampling.sample_rows(x, numbers(64, 2, of=int32), numbers(64, 4, of=torch.float32))
    for groups in (4, 2):  # few rows for each expert, and many
        ends, bias = numbers(groups, of=int32), numbers(groups, 64)
        experts.grouped_linear(x, numbers(groups, 64, hidden), ends, bias)
        experts.grouped_linear(x, numbers(groups, hidden, 64).transpose(1, 2), ends)
    q, new, weight = numbers(64, heads, head_dim), numbers(64, kv_heads, head_dim), x[0, :head_dim]
    cos, slots = numbers(64, head_dim), numbers(64, of=torch.int64)
    for k, v in caches:
        layers.rotate_and_store(
            q, new, new, cos, cos, k, v, slots, norms=(weight, weight), eps=1e-6
        )
    for shape in RECURRENT.values():
        launch_recurrence(numbers, *shape)
    for channels, kernel, activation in CONVOLUTIONS:
        convolution.convolve_paths(
            *(numbers(1, 64, channels), numbers(4, channels, kernel - 1), numbers(1, of=int32)),
            *(numbers(1, 64, kernel, of=torch.int64), numbers(channels, kernel)),
            activation=activation,
        )


def launch_recurrence(
    numbers: Callable[..., torch.Tensor],  # shape, dtype -> zeros
    heads: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    delta: bool,
    nodes: int = 64,
) -> None:
    """Launch the kernels of a recurrent layer, and of a commit of two layers."""
    int32, float32 = torch.int32, torch.float32
    visits, counts = numbers(1, nodes, 3, of=int32), numbers(1, of=int32)
    tree = TreeNodes(numbers(1, nodes, nodes, of=torch.bool), visits=visits, counts=counts)
    states = numbers(4, 2, heads, key_dim, value_dim, of=float32)
    if not delta:  # other layers store them so
        states = numbers(4, 2, heads, value_dim, key_dim, of=float32).mT
    q, log_g = numbers(1, nodes, key_heads, key_dim), numbers(1, nodes, heads, 1, of=float32)
    _, written, keys = recurrence.tree_recurrence(
        *(q, q, numbers(1, nodes, heads, value_dim), log_g),
        *(numbers(1, nodes, heads) if delta else None, states[:, 0], counts, tree),
        normalise=delta,
    )
    writes, read, gates = (x.expand(2, *x.shape) for x in (written, keys, log_g.transpose(1, 2)))
    paths = numbers(1, PATH_COLUMNS + nodes, of=int32)
    recurrence.commit_recurrence(writes, read, gates, states, paths)


def measure(capability: int, model: str) -> Iterator[Row]:
    """Yield what each kernel takes for a model on an architecture."""
    compiler = CompileOnly(capability)
    driver.set_active(cast(Any, compiler))
    heads, kv_heads, head_dim, hidden, dtype = SHAPES[model]
    if dtype == torch.bfloat16 and capability < FIRST_BFLOAT16:
        dtype = torch.float16
    launch_all(heads, kv_heads, head_dim, hidden, dtype)
    for name, cubin, shared in compiler.cubins:
        registers, stack = resources(cubin)
        yield {
            **{"capability": capability, "model": model, "kernel": name.strip("_")},
            **{"shared_bytes": shared, "registers": registers},
            "spilled_bytes": stack,  # the kernels have no other use for a stack
        }


def resources(cubin: bytes) -> tuple[int, int]:
    """Read a thread's registers and bytes of stack with NVIDIA's tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers,), (stack,) = re.findall(r"REG:(\d+)", text), re.findall(r"STACK:(\d+)", text)
    return int(registers), int(stack)


def parser() -> Parser:
    """Build the parser of the command line."""
    options = Parser(__doc__)
    known = ", ".join(map(str, SHARED_MEMORY))
    options.add_argument(
        "--capability", type=integer, metavar="N", help=f"one architecture (default: {known})"
    )
    options.add_argument("--model", choices=SHAPES, help="the shapes of one model (default: all)")
    return options


@command(parser)
def main(args: Namespace) -> int:
    """Compile, print, write."""
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, but an interpreter compiles nothing; unset it")
    capabilities = [args.capability] if args.capability else list(SHARED_MEMORY)
    pairs = list(product(capabilities, [args.model] if args.model else SHAPES))
    return publish(args, {}, rows=[x for pair in track(pairs, "compiling") for x in measure(*pair)])


if __name__ == "__main__":
    sys.exit(main())
