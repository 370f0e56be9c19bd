"""What functions for CPUs are written with: LLVM's intermediate representation (IR), by llvmlite.

Functions of the kernels' modules add instructions at a builder and return their result, so that a
kernel is read from its top to its bottom like a program. `machine_code` compiles it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from llvmlite import ir

Value: TypeAlias = ir.Value
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
HALF, FLOAT, POINTER, VOID = ir.HalfType(), ir.FloatType(), ir.PointerType(), ir.VoidType()

FORK = "GOMP_parallel"
"""The function of GCC's OpenMP, as PyTorch has it on Linux, that runs a function in threads."""
TO_EVEN = 1.5 * 2**23
"""Added to a float32 of a small size and subtracted again, it rounds to integers, ties to even."""
QUIET_NAN = 0x7FC00000
OF_RECORD = "_of_record"
"""Suffix of the functions that read the arguments of another one from memory."""
STORED: Mapping[str, tuple[type[ctypes._SimpleCData[Any]], str]] = {
    "ptr": (ctypes.c_void_p, "i8"),
    "i64": (ctypes.c_int64, "i8"),
    "i32": (ctypes.c_int, "i4"),
    "float": (ctypes.c_float, "f4"),
}
"""Types of arguments for ctypes, and in NumPy's records, by LLVM's names."""


class Isa(NamedTuple):
    """A set of instructions, with the product of bytes that it has."""

    name: str
    lanes: int  # float32 numbers of a vector
    signed: bool  # whether numbers of 8 bits are multiplied with a sign
    needed: tuple[str, ...]  # the processor's features, under LLVM's names
    features: str  # what LLVM may use besides


AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma", "f16c")
ISAS: tuple[Isa, ...] = (
    Isa("AVX-512 VNNI", 16, False, AVX512, "-prefer-256-bit"),
    Isa("AVX-VNNI", 8, False, ("avxvnni", "avx2", "fma", "f16c"), ""),
    Isa("AVX2", 8, True, ("avx2", "fma", "f16c"), ""),
    Isa("NEON", 4, True, ("neon", "dotprod"), ""),
)
"""The best one first."""
GENERIC = Isa("plain vectors", 4, False, (), "")
"""Instructions that every processor has: for tests."""


def vector(kind: ir.Type, lanes: int) -> ir.Type:
    return ir.VectorType(kind, lanes)


def like(x: Value, kind: ir.Type) -> ir.Type:
    """Return the type of as many numbers of a kind as a value has."""
    return vector(kind, x.type.count) if isinstance(x.type, ir.VectorType) else kind


def constant(kind: ir.Type, value: float) -> Value:
    """Return a number, or a vector of equal numbers."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)
    return ir.Constant(kind, value)


def task(module: ir.Module, name: str, *kinds: ir.Type) -> ir.Function:
    """Add a function without a result that only the module's functions call."""
    function = ir.Function(module, ir.FunctionType(VOID, kinds), name)
    function.linkage = "internal"
    function.attributes.add("nounwind")
    return function


def add_record_function(function: ir.Function) -> None:
    """Add a function that reads the arguments of another one from a record; see `record_type`."""
    kinds = function.function_type.args
    record = ir.LiteralStructType(kinds, packed=True)
    name = f"{function.name}{OF_RECORD}"
    caller = ir.Function(function.module, ir.FunctionType(VOID, [POINTER]), name)
    b = Builder(caller.append_basic_block())
    places = ([constant(I32, 0), constant(I32, n)] for n in range(len(kinds)))
    addresses = [b.gep(caller.args[0], place, source_etype=record) for place in places]
    b.call(function, [b.read(x, kind) for x, kind in zip(addresses, kinds, strict=True)])
    b.ret_void()


def record_type(fields: Mapping[str, ir.Type]) -> np.dtype[np.void]:
    """Return the type of a record with a function's arguments."""
    return np.dtype([(name, STORED[str(kind)][1]) for name, kind in fields.items()])


def argument_types(fields: Mapping[str, ir.Type]) -> list[type[ctypes._SimpleCData[Any]]]:
    """Return the types of a function's arguments."""
    return [STORED[str(kind)][0] for kind in fields.values()]


def declare_fork(module: ir.Module) -> ir.Function:
    """Declare `FORK`: a function, its argument, the number of threads, and flags."""
    return ir.Function(module, ir.FunctionType(VOID, [POINTER, POINTER, I32, I32]), FORK)


class Builder(ir.IRBuilder):
    """Adds instructions to a function; the methods are what kernels do often."""

    def at(self, base: Value, index: Value, kind: ir.Type = I8) -> Value:
        """Return the address of a number of some kind after a base."""
        return self.gep(base, [index], source_etype=kind)

    def read(self, address: Value, kind: ir.Type, align: int = 1) -> Value:
        return self.load(address, align=align, typ=kind)

    def times(self, x: Value, factor: Value | int) -> Value:
        return self.mul(x, constant(x.type, factor) if isinstance(factor, int) else factor)

    def plus(self, x: Value, term: Value | int) -> Value:
        return self.add(x, constant(x.type, term) if isinstance(term, int) else term)

    def splat(self, x: Value, lanes: int) -> Value:
        """Return a vector of equal numbers."""
        kind = vector(x.type, lanes)
        first = self.insert_element(ir.Constant(kind, ir.Undefined), x, constant(I32, 0))
        mask = ir.Constant(vector(I32, lanes), [0] * lanes)
        return self.shuffle_vector(first, ir.Constant(kind, ir.Undefined), mask)

    def intrinsic(self, name: str, result: ir.Type, *arguments: Value) -> Value:
        """Call a function of LLVM, which is declared at its first call."""
        found = self.module.globals.get(name)
        if found is None:
            kinds = [x.type for x in arguments]
            found = ir.Function(self.module, ir.FunctionType(result, kinds), name)
        return self.call(found, arguments)

    def fused(self, x: Value, factor: Value, term: Value) -> Value:
        """Return x * factor + term, rounded once."""
        return self.intrinsic(f"llvm.fma.v{x.type.count}f32", x.type, x, factor, term)

    def repeat(
        self,
        count: Value,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """Run a loop of one turn or more; `body` takes the turn and returns what is carried on."""
        before, top = self.block, self.append_basic_block("loop")
        self.branch(top)
        self.position_at_end(top)
        turn = self.phi(I64)
        values = [self.phi(x.type) for x in carried]
        after = list(body(turn, values))
        following = self.plus(turn, 1)
        for value, first, last in zip(
            [turn, *values], [constant(I64, 0), *carried], [following, *after], strict=True
        ):
            value.add_incoming(first, before)
            value.add_incoming(last, self.block)
        end = self.append_basic_block("end")
        self.cbranch(self.icmp_unsigned("<", following, count), top, end)
        self.position_at_end(end)
        return after

    def allocate(self, kind: ir.Type) -> Value:
        """Return the address of a variable on the stack."""
        variable = self.alloca(kind)
        variable.type = POINTER  # LLVM no longer knows the type of a pointer's target
        return variable

    @contextmanager
    def taking(self, taken: Value, step: Value, count: Value) -> Iterator[Value]:
        """Run a loop over what this thread takes: each turn has the first of `step` of `count`.

        `taken` is the address of how many the threads have taken.
        """
        top, turn, end = (self.append_basic_block(x) for x in ("take", "turn", "done"))
        self.branch(top)
        self.position_at_end(top)
        first = self.atomic_rmw("add", taken, step, "monotonic")
        self.cbranch(self.icmp_unsigned("<", first, count), turn, end)
        self.position_at_end(turn)
        yield first
        self.branch(top)
        self.position_at_end(end)

    def run(self, function: Value, job: Value, fork: Value, threads: Value, shared: Value) -> None:
        """Call a function of a job: in all threads if `shared`, else in this one."""
        with self.if_else(shared) as (then, otherwise):
            with then:
                self.call(fork, [function, job, threads, constant(I32, 0)])
            with otherwise:
                self.call(function, [job])

    def widen(self, bits: Value) -> Value:
        """Return bfloat16 numbers, or one, as float32."""
        floats, integers = like(bits, FLOAT), like(bits, I32)
        return self.bitcast(self.shl(self.zext(bits, integers), constant(integers, 16)), floats)

    def narrow(self, values: Value) -> Value:
        """Return the bits of bfloat16 numbers, or one: float32 rounded, ties to even."""
        kind = like(values, I32)
        bits, sixteen = self.bitcast(values, kind), constant(kind, 16)
        odd = self.and_(self.lshr(bits, sixteen), constant(kind, 1))
        rounded = self.add(self.add(bits, odd), constant(kind, 0x7FFF))
        # Rounding would turn some NaN into a number.
        is_nan = self.fcmp_unordered("uno", values, values)
        rounded = self.select(is_nan, constant(kind, QUIET_NAN), rounded)
        return self.trunc(self.lshr(rounded, sixteen), like(values, I16))

    def lesser(self, x: Value, y: Value) -> Value:
        return self.select(self.icmp_unsigned("<", x, y), x, y)
