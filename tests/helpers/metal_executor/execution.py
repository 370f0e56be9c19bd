"""Executes kernels under several schedules, in the place of `mx.fast.metal_kernel`."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from metal_executor.compiler import Compiler, line_of
from metal_executor.kernel_source import KernelSource

Template: TypeAlias = Sequence[tuple[str, bool | int | mx.Dtype]]
Size: TypeAlias = tuple[int, int, int]


class MetalKernelError(AssertionError):
    """A kernel does what it must not do, or its results depend on the order of its threads."""


@dataclass(frozen=True)
class Schedule:
    """An order of threads, and what differs with it.

    Attributes:
        name: in messages.
        order: 0 ascending, 1 descending, 2 random.
        seed: of the random order.
        at_end: whether buffers lie at the end of their pages, else at the start.
        checks_accesses: whether every access is checked.
        fill: 16 bits of what nothing has written; NaN in every type of floats.
    """

    name: str
    order: int
    seed: int = 0
    at_end: bool = True
    checks_accesses: bool = False
    fill: int = 0xFFFF


ASCENDING = Schedule("ascending", 0, checks_accesses=True, fill=0x7FC1)
DESCENDING = Schedule("descending", 1, at_end=False)
RANDOM = Schedule("random", 2, seed=1, fill=0x7FD3)
SCHEDULES = (ASCENDING, DESCENDING, RANDOM)
_ONE_AT_A_TIME = threading.Lock()


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("host", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("element", ctypes.c_size_t),
        ("start", ctypes.c_size_t),
        ("output", ctypes.c_int),
        ("initialised", ctypes.c_int),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("body", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_int),
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint32),
        ("at_end", ctypes.c_int),
        ("checks_accesses", ctypes.c_int),
        ("fill", ctypes.c_uint16),
        ("most_milliseconds", ctypes.c_uint32),
    )


class _Failure(ctypes.Structure):
    _fields_ = (
        ("text", ctypes.c_char * 1024),
        ("thread", ctypes.c_char * 128),
        ("file", ctypes.c_char * 512),
        ("offset", ctypes.c_uint64),
    )


@dataclass
class MetalExecutor:
    """Makes kernels as `mx.fast.metal_kernel` does, and runs them on the CPU.

    Attributes:
        folder: for compiled kernels.
        schedules: every kernel runs under each.
        max_seconds: of the processor in a run; more are taken for a loop that does not end.
        max_threads: of a threadgroup.
        launches: how often each kernel was run, by name.
        rounding: relative errors of results, by dtype: none, for the order of operations is known.
        speedup: stands for `treeflash_mlx.metal_kernels.speedup`, for times here tell nothing.
        faults: texts that are planted in kernels: the beginning of their names, the right text and
            the wrong one.
        planted: whether a kernel had one of them.
    """

    folder: Path
    schedules: tuple[Schedule, ...] = SCHEDULES
    max_seconds: float = 60
    max_threads: int = 1024
    launches: dict[str, int] = field(default_factory=dict)
    rounding: Mapping[mx.Dtype, float] = field(default_factory=lambda: defaultdict(float))
    speedup: Callable[..., float] = lambda *_: 1.0
    faults: list[tuple[str, str, str]] = field(default_factory=list)
    planted: bool = False

    def __post_init__(self) -> None:
        self.compiler = Compiler(self.folder)

    def source_of(self, kernel: MetalKernel) -> str:
        """Return the source of a kernel, with the faults that are planted in it."""
        source = kernel.source
        for name, right, wrong in self.faults:
            if kernel.name.startswith(name) and right in source:
                source, self.planted = source.replace(right, wrong), True
        return source

    def metal_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: object | None = None,
    ) -> MetalKernel:
        """See `mx.fast.metal_kernel`."""
        if not output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")
        return MetalKernel(
            self,
            name,
            tuple(input_names),
            tuple(output_names),
            source,
            header,
            ensure_row_contiguous,
            atomic_outputs,
        )


@dataclass
class MetalKernel:
    """A kernel; see `mx.fast.metal_kernel`."""

    executor: MetalExecutor
    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Size,
        threadgroup: Size,
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run the kernel under all schedules.

        Raises:
            MetalCompileError: the source is not a kernel.
            MetalKernelError: see `metal_executor`.
        """
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        for found, names, what in (
            (arrays, self.input_names, "inputs"),
            (output_shapes, self.output_names, "output_shapes"),
            (output_dtypes, self.output_names, "output_dtypes"),
        ):
            if len(found) != len(names):
                raise ValueError(
                    f"[metal_kernel] Expected `{what}` to have size {len(names)} but got size "
                    f"{len(found)}."
                )
        group = tuple(map(min, threadgroup, grid))
        if prod(threadgroup) > (most := self.executor.max_threads):
            raise ValueError(f"Thread group size ({prod(threadgroup)}) is greater than {most}.")
        if min(*grid, *threadgroup) < 1:
            raise MetalKernelError(f"kernel {self.name}: grid {grid}, threadgroup {threadgroup}")
        source = KernelSource.write(
            self.name,
            list(zip(self.input_names, arrays, strict=True)),
            list(zip(self.output_names, output_dtypes, strict=True)),
            self.executor.source_of(self),
            self.header,
            template or (),
            self.atomic_outputs,
        )
        if verbose:
            print(source.metal)
        library = self.executor.compiler.load(source.cpp)
        mx.eval(arrays)
        data = [_Data.of(x, self.ensure_row_contiguous) for x in arrays]
        fill = None
        if init_value is not None:
            fill = [
                _bytes_of(mx.full(s, init_value, d))
                for s, d in zip(output_shapes, output_dtypes, strict=True)
            ]
        results = [
            self._run(library, source, data, output_shapes, output_dtypes, fill, grid, group, x)
            for x in self.executor.schedules
        ]
        self._compare(results, output_dtypes)
        self.executor.launches[self.name] = self.executor.launches.get(self.name, 0) + 1
        return [
            _array_of(x, shape, dtype)
            for x, shape, dtype in zip(results[0], output_shapes, output_dtypes, strict=True)
        ]

    def _run(
        self,
        library: ctypes.CDLL,
        source: KernelSource,
        inputs: Sequence[_Data],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        initial: Sequence[NDArray[np.uint8]] | None,
        grid: Size,
        group: tuple[int, ...],
        schedule: Schedule,
    ) -> list[NDArray[np.uint8]]:
        """The bytes of the outputs under one schedule."""
        outputs = [
            np.zeros(prod(shape) * dtype.size, np.uint8) if initial is None else initial[i].copy()
            for i, (shape, dtype) in enumerate(zip(output_shapes, output_dtypes, strict=True))
        ]
        buffers, kept = [], []
        for parameter in source.parameters:
            element, start, is_output = 4, 0, parameter.kind == "output"
            if is_output:
                values = outputs[parameter.index]
                element = output_dtypes[parameter.index].size
            elif parameter.kind == "input":
                found = inputs[parameter.index]
                values, element, start = found.values, found.element, found.start
            else:
                values = inputs[parameter.index].describe(parameter.kind)
                element = values.itemsize
            kept.append(values)
            name = parameter.declaration.split()[-1].encode()
            buffers.append(
                _Buffer(
                    name,
                    values.ctypes.data,
                    values.nbytes,
                    element,
                    start,
                    is_output,
                    initial is not None,
                )
            )
        launch = _Launch(
            ctypes.cast(library.metal_body, ctypes.c_void_p),
            (_Buffer * len(buffers))(*buffers),
            len(buffers),
            grid,
            group,
            schedule.order,
            schedule.seed,
            schedule.at_end,
            schedule.checks_accesses,
            schedule.fill,
            int(1000 * self.executor.max_seconds),
        )
        failure = _Failure()
        with _ONE_AT_A_TIME:  # the scheduler has the state of one launch
            failed = self.executor.compiler.scheduler.metal_launch(
                ctypes.byref(launch), ctypes.byref(failure)
            )
        if failed:
            raise self._error(failure, schedule)
        return outputs

    def _error(self, failure: _Failure, schedule: Schedule) -> MetalKernelError:
        text = failure.text.decode(errors="replace")
        line = line_of(failure.file.decode(), failure.offset)
        lines = self.source.splitlines()
        if line is not None and 1 <= line <= len(lines):
            text += f" at line {line}: {lines[line - 1].strip()}"
        if failure.thread:
            text += f" ({failure.thread.decode()})"
        return MetalKernelError(f"kernel {self.name}, {schedule.name} schedule: {text}")

    def _compare(
        self, results: Sequence[Sequence[NDArray[np.uint8]]], dtypes: Sequence[mx.Dtype]
    ) -> None:
        """Raise if the schedules do not agree."""
        for other, schedule in zip(results[1:], self.executor.schedules[1:], strict=True):
            for name, dtype, a, b in zip(self.output_names, dtypes, results[0], other, strict=True):
                if np.array_equal(a, b):
                    continue
                if self.atomic_outputs and dtype == mx.float32:
                    pair = (x.view(np.float32) for x in (a, b))
                    if np.allclose(*pair, rtol=1e-4, atol=1e-5):
                        continue
                different = (a != b).reshape(-1, dtype.size).any(1)
                raise MetalKernelError(
                    f"kernel {self.name}: output {name} depends on the order of the threads, or on "
                    f"memory that nothing has written: {different.sum()} of {different.size} "
                    f"elements differ between the {self.executor.schedules[0].name} and "
                    f"{schedule.name} schedules, the first at {different.argmax()}"
                )


@dataclass(frozen=True)
class _Data:
    """An input in memory.

    Attributes:
        values: its bytes, from the lowest to the highest that it uses.
        element: bytes of an element.
        start: bytes from the lowest to the first element.
        shape: of the array.
        strides: of the array, in elements.
    """

    values: NDArray[np.uint8]
    element: int
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, array: mx.array, contiguous: bool) -> _Data:
        """The bytes of an array, in its own layout or row by row."""
        element = array.dtype.size
        view = _numpy_of(array)
        if contiguous or view.size == 0 or view.flags.c_contiguous:
            view = np.ascontiguousarray(view).reshape(view.shape)
            values = np.frombuffer(view.tobytes(), np.uint8)
            strides = tuple(prod(view.shape[i + 1 :]) for i in range(view.ndim))
            return cls(values, element, 0, view.shape, strides)
        spans = [s * (n - 1) for s, n in zip(view.strides, view.shape, strict=True)]
        lowest = sum(min(x, 0) for x in spans)
        size = sum(map(abs, spans)) + element
        memory = (ctypes.c_uint8 * size).from_address(view.ctypes.data + lowest)
        strides = tuple(s // element for s in view.strides)
        return cls(np.array(memory, np.uint8), element, -lowest, view.shape, strides)

    def describe(self, kind: str) -> NDArray[Any]:
        """The buffer of the shape, the strides or the number of axes."""
        if kind == "ndim":
            return np.array([len(self.shape)], np.int32)
        return np.array(*((self.shape, np.int32) if kind == "shape" else (self.strides, np.int64)))


def _numpy_of(array: mx.array) -> NDArray[Any]:
    """The array's own memory; NumPy has no bfloat16."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
        mx.eval(array)
    return np.asarray(memoryview(array))


def _bytes_of(array: mx.array) -> NDArray[np.uint8]:
    mx.eval(array)
    return np.frombuffer(np.ascontiguousarray(_numpy_of(array)).tobytes(), np.uint8)


def _array_of(values: NDArray[np.uint8], shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    if dtype == mx.bool_:
        return mx.array(values.view(np.bool_)).reshape(shape)
    return mx.array(values).view(dtype).reshape(shape)
