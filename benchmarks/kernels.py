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
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any, cast
from unittest import mock

import torch
import triton
from rich.progress import track
from treeflash_cuda.gpu import kernel_loading
from treeflash_cuda.gpu.triton_kernels import noise, products, recurrence, sampling
from treeflash_cuda.operations import Shapes
from treeflash_cuda.quantised_weights import BITS, GROUP, QuantisedWeight
from treeflash_cuda.recurrence import TreeNodes
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
SIZES = "heads", "kv_heads", "head_dim", "hidden_size"
SHAPES: dict[str, tuple[Any, ...]] = {
    "qwen3-8b": (32, 8, 128, 4096, torch.bfloat16),
    "llama-3.2-1b": (32, 8, 64, 2048, torch.float16),
    "gemma-2-9b": (16, 8, 256, 3584, torch.bfloat16),
    "qwen3-8b in float32": (32, 8, 128, 4096, torch.float32),
}
"""The `SIZES` of models, and their dtypes."""
RECURRENT = (32, 128, 128, False), (48, 128, 64, True)
"""Recurrent layers of Qwen3-Next and Granite 4, as in `Shapes`; measured beside every model."""
CONVOLUTIONS = (8192, 4), (2048, 3)
"""Convolutions of Qwen3-Next and LFM2, likewise."""
VARIANTS: tuple[dict[str, Any], ...] = (
    {"recurrent": RECURRENT, "convolutions": CONVOLUTIONS, "experts": True, "draft_bits": BITS},
    {"quantised": True},
    {"softcap": 50.0, "sinks": True},
)
NODES = 64
"""Rows of a large pass."""


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


def launch_all(sizes: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Launch every kernel for a model: as its load checks them, and with sizes of large passes."""
    for settings in VARIANTS:
        shapes = Shapes(**sizes, **settings)
        # Nothing runs, so that results are not compared.
        with mock.patch.object(kernel_loading, "_worst_row", return_value=0.0):
            reasons = kernel_loading.load_operations(shapes, torch.device("cpu"), dtype).reasons
        if reasons:
            raise RuntimeError(f"kernels do not compile: {reasons}")

    def numbers(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of)

    int32, hidden = torch.int32, sizes["hidden_size"]
    x, noisy = numbers(NODES, hidden), numbers(NODES, 3, of=int32)
    products.linear(x, numbers(4 * hidden, hidden), numbers(4 * hidden))
    groups = hidden // GROUP
    for bits, rows in product(BITS, (x, x[:32], x[:1])):
        stored = numbers(groups, 64, GROUP * bits // 8, of=torch.uint8)
        scales, minima = numbers(2, groups, 64)
        products.quantised_linear(rows, QuantisedWeight(stored, scales, minima))
    for added, ids in ((noisy[:0], None), (noisy, None), (noisy, numbers(hidden, of=torch.int64))):
        noise.noisy_log_probs(x, added, 1.0, ids)
    sampling.sample_rows(x, noisy[:, :2], numbers(NODES, 4, of=torch.float32))
    tree = TreeNodes(
        numbers(1, NODES, NODES, of=torch.bool),
        visits=numbers(1, NODES, 3, of=int32),
        counts=numbers(1, of=int32),
    )
    for heads, key_dim, value_dim, _ in RECURRENT:
        q = numbers(1, NODES, heads // 2, key_dim)
        recurrence.tree_recurrence(
            *(q, q, numbers(1, NODES, heads, value_dim), numbers(1, NODES, heads, 1).float()),
            *(numbers(1, NODES, heads), numbers(4, heads, key_dim, value_dim).float()),
            *(numbers(1, of=int32), tree),
            normalise=True,
        )


def measure(capability: int, model: str) -> Iterator[Row]:
    """Yield what each kernel takes for a model on an architecture."""
    compiler = CompileOnly(capability)
    driver.set_active(cast(Any, compiler))
    *numbers, dtype = SHAPES[model]
    if dtype == torch.bfloat16 and capability < FIRST_BFLOAT16:
        dtype = torch.float16
    launch_all(dict(zip(SIZES, numbers, strict=True)), dtype)
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
