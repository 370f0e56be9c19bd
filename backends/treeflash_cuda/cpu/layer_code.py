"""The small operations of a decoder's layer on a CPU, as LLVM's intermediate representation.

Between the products of a layer PyTorch needs about 25 operations, each of which takes longer to
start than to compute a few rows. Here they are a few functions, written with `ir_builder`:

- `norm` adds a sublayer's output to the residual, and norms the sum
- `turn` norms and rotates queries and keys in place, and writes keys and values to the caches
- `attend` is the attention of rows over the keys of their sequences, nodes of trees among them
- `silu` and `gelu_pytorch_tanh` are activation(gate) * up
- `cap` bounds logits by cap * tanh(logit / cap)

A row's result depends on nothing but the row and the keys that it sees. All sums have one order,
whatever the processor: of 16 partial sums over the numbers of a row, and in attention of head
dimensions, then of keys by their columns. A key that a row does not see adds 0 to sums, which
changes no bit. So a token has equal bits alone, in a tree and in a prompt.

Attention computes 16 lanes at once, each of them a query: the heads of a group that share keys, of
one row after the other. A key's numbers are broadcast to the lanes:

    scores[key][lane] += key[d] * query[d][lane]               for each d, for 8 keys at once
    weights[key][lane] = exp(scores[key][lane] - largest[lane]),  or 0 where it is not seen
    output[d][lane] += value[key][d] * weights[key][lane]      for each key, for 16 d at once
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

from llvmlite import ir

from treeflash_cuda.cpu.ir_builder import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    POINTER,
    TO_EVEN,
    VOID,
    Builder,
    Value,
    add_record_function,
    constant,
    declare_fork,
    task,
    vector,
)

Fields: TypeAlias = dict[str, ir.Type]

LANES = 16
SEQUENCE = ("keys", "values", "head_stride", "committed", "rows", "row_end", "unit_end", "mask")
"""Columns of the table of a pass's sequences in one layer, in int64:

- keys, values: addresses of (kv_heads, columns, head_dim) stored numbers
- head_stride: between the heads there, in numbers
- committed, rows: columns before the pass, and rows of the pass, which follow them
- row_end: rows of the pass up to and with this sequence
- unit_end: units of `attend` up to and with this sequence
- mask: address of (rows, rows) bytes, 1 where a row sees a new column; 0: all
"""
_ROWS: Fields = dict.fromkeys(("y", "weight", "normed"), POINTER)
_SUMS: Fields = dict.fromkeys(("residual", "total"), POINTER)
_SIZES: Fields = {"size": I64, "eps": FLOAT}
_SEQUENCES: Fields = {"table": POINTER, "sequences": I64, "kv_heads": I64, "column_stride": I64}
_GATED: Fields = {"gate_up": POINTER, "output": POINTER, "size": I64}
FIELDS: Mapping[str, Fields] = {
    "norm": _ROWS | _SIZES,
    "norm_sum": _ROWS | _SUMS | _SIZES,
    "turn": {
        **dict.fromkeys(("heads", "cos", "sin", "norms"), POINTER),
        **{"heads_of_row": I64, "eps": FLOAT, "is_rotated": I32, "is_normed": I32},
        **_SEQUENCES,
    },
    "attend": {
        **dict.fromkeys(("queries", "output", "bounds"), POINTER),
        **{"stride": I64, "group": I64, "scale": FLOAT, "cap": FLOAT},
        **_SEQUENCES,
        **{"scratch": POINTER, "scratch_size": I64},
    },
    "silu": _GATED,
    "gelu_pytorch_tanh": _GATED,
    "cap": {"x": POINTER, "size": I64, "cap": FLOAT},
}
"""Arguments of the functions, before the numbers of `UNITS`."""
UNITS: Fields = {"units": I64, "threads": I32}
RUN_CALLS = "run_calls"
KEYS = 8
"""Keys whose scores are computed at once."""
FLOATS, INTEGERS = vector(FLOAT, LANES), vector(I32, LANES)
LEAST_EXPONENT = -87.0
"""Below it, exp(x) counts as 0: it is not a normal float32."""
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
"""Coefficients of exp's polynomial (Cephes), for arguments between -ln 2 / 2 and ln 2 / 2."""
LOG2_E, LN2_HIGH, LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4


@dataclass(frozen=True)
class Element:
    """How the numbers of tensors are stored."""

    is_wide: bool  # float32, else bfloat16

    @property
    def kind(self) -> ir.Type:
        return FLOAT if self.is_wide else I16

    def read(self, b: Builder, base: Value, index: Value) -> Value:
        """Read 16 numbers as float32."""
        at = b.at(base, index, self.kind)
        if self.is_wide:
            return b.read(at, FLOATS, 4)
        return b.widen(b.read(at, vector(I16, LANES), 2))

    def read_one(self, b: Builder, base: Value, index: Value) -> Value:
        """Read one number as float32."""
        at = b.at(base, index, self.kind)
        if self.is_wide:
            return b.read(at, FLOAT, 4)
        return b.widen(b.read(at, I16, 2))

    def write(self, b: Builder, base: Value, index: Value, values: Value) -> None:
        """Write 16 numbers, or one, rounded to even."""
        at = b.at(base, index, self.kind)
        if self.is_wide:
            b.store(values, at, align=4)
        else:
            b.store(b.narrow(values), at, align=2)

    def round(self, b: Builder, values: Value) -> Value:
        """Round float32 numbers to what is stored."""
        return values if self.is_wide else b.widen(b.narrow(values))


WIDE = Element(is_wide=True)
"""How the weights of norms are stored."""


@dataclass(frozen=True)
class LayerKind:
    """What the code of a decoder's layers depends on."""

    head_dim: int  # a multiple of 32
    caps_scores: bool = False  # whether scores are bounded by `cap`
    norms_wholes: bool = False  # whether all queries are normed as one, and all keys


def build(element: Element, cached: Element, kind: LayerKind, threads: bool) -> str:
    """Write the IR of all functions.

    Args:
        element: of the layers' inputs and outputs.
        cached: of stored keys and values.
        kind: of the layers.
        threads: whether functions may run in several threads of PyTorch.
    """
    module = ir.Module("layer")
    writer = Writer(module, declare_fork(module) if threads else None)
    writer.add("norm", partial(_norm, element=element, adds=False))
    writer.add("norm_sum", partial(_norm, element=element, adds=True))
    writer.add("turn", partial(_turn, element=element, cached=cached, kind=kind))
    writer.add("attend", partial(_attend, element=element, cached=cached, kind=kind))
    for name, sharpen in ACTIVATIONS.items():
        writer.add(name, partial(_gated, element=element, sharpen=sharpen))
    writer.add("cap", partial(_cap_row, element=element))
    _run_calls(module)
    return str(module)


def _run_calls(module: ir.Module) -> None:
    """Write `RUN_CALLS`: it calls `count` functions, each with a record.

    The addresses of a function and of its record follow each other.
    """
    entry = ir.Function(module, ir.FunctionType(VOID, [POINTER, I64]), RUN_CALLS)
    calls, count = entry.args
    b = Builder(entry.append_basic_block())
    function_type = ir.FunctionType(VOID, [POINTER]).as_pointer()

    def call(turn: Value, _: list[Value]) -> list[Value]:
        first = b.times(turn, 2)
        function, record = (
            b.inttoptr(b.read(b.at(calls, b.plus(first, n), I64), I64, 8), kind)
            for n, kind in enumerate((function_type, POINTER))
        )
        b.call(function, [record])
        return []

    b.repeat(count, [], call)
    b.ret_void()


class Writer:
    """Adds functions to a module that run a task for each of many units, in threads if asked to."""

    def __init__(self, module: ir.Module, fork: ir.Function | None) -> None:
        self.module, self.fork = module, fork

    def add(
        self,
        name: str,
        unit: Callable[[Builder, dict[str, Value], Value], None],
    ) -> None:
        """Add a function with these `FIELDS`, and `UNITS`, and another one with a record of them.

        `unit` writes what is done for a unit. The field `scratch` becomes the part of a thread.
        """
        fields = FIELDS[name]
        names = [*fields, "units", "next", "slot"]
        job_type = ir.LiteralStructType([*fields.values(), I64, I64, I64])
        part = task(self.module, f"{name}_task", POINTER)

        def field(b: Builder, job: Value, name: str) -> Value:
            indices = [constant(I32, 0), constant(I32, names.index(name))]
            return b.gep(job, indices, source_etype=job_type)

        b, job = Builder(part.append_basic_block()), part.args[0]
        read = {x: b.load(field(b, job, x), typ=kind) for x, kind in fields.items()}
        units = b.load(field(b, job, "units"), typ=I64)
        one = constant(I64, 1)
        if "scratch" in read:
            slot = b.atomic_rmw("add", field(b, job, "slot"), one, "monotonic")
            read["scratch"] = b.at(read["scratch"], b.mul(slot, read["scratch_size"]), FLOAT)
        with b.taking(field(b, job, "next"), one, units) as number:
            unit(b, read, number)
        b.ret_void()

        kinds = [*fields.values(), *UNITS.values()]
        entry = ir.Function(self.module, ir.FunctionType(VOID, kinds), name)
        b = Builder(entry.append_basic_block())
        job = b.allocate(job_type)
        *given, threads = entry.args
        zero = constant(I64, 0)
        for x, value in zip(names, [*given, zero, zero], strict=True):
            b.store(value, field(b, job, x))
        if self.fork is None:
            b.call(part, [job])
        else:
            b.run(part, job, self.fork, threads, b.icmp_signed(">", threads, constant(I32, 1)))
        b.ret_void()
        add_record_function(entry)


def _norm(b: Builder, f: dict[str, Value], row: Value, element: Element, adds: bool) -> None:
    """Write RMSNorm of a row, or of its sum with the residual, which is written, too."""
    first = b.mul(row, f["size"])
    steps = b.udiv(f["size"], constant(I64, LANES))
    source = f["total"] if adds else f["y"]

    def add(turn: Value, squares: list[Value]) -> list[Value]:
        at = b.plus(first, b.times(turn, LANES))
        x = element.read(b, f["y"], at)
        if adds:
            x = element.round(b, b.fadd(x, element.read(b, f["residual"], at)))
            element.write(b, f["total"], at, x)
        return [b.fused(x, x, squares[0])]

    squares = b.repeat(steps, [constant(FLOATS, 0.0)], add)[0]
    inverse = b.splat(_inverse_root(b, squares, f["size"], f["eps"]), LANES)

    def scale(turn: Value, _: list[Value]) -> list[Value]:
        column = b.times(turn, LANES)
        at = b.plus(first, column)
        normed = element.round(b, b.fmul(element.read(b, source, at), inverse))
        element.write(b, f["normed"], at, b.fmul(normed, WIDE.read(b, f["weight"], column)))
        return []

    b.repeat(steps, [], scale)


def _squares(b: Builder, element: Element, base: Value, first: Value, size: Value) -> Value:
    """Return 16 partial sums of the squares of `size` numbers."""

    def add(turn: Value, sums: list[Value]) -> list[Value]:
        x = element.read(b, base, b.plus(first, b.times(turn, LANES)))
        return [b.fused(x, x, sums[0])]

    steps = b.udiv(size, constant(I64, LANES))
    return b.repeat(steps, [constant(FLOATS, 0.0)], add)[0]


def _inverse_root(b: Builder, squares: Value, size: Value, eps: Value) -> Value:
    """Return 1 / sqrt(mean of squares + eps), from 16 partial sums."""
    mean = b.fdiv(_total(b, squares), b.uitofp(size, FLOAT))
    root = b.intrinsic("llvm.sqrt.f32", FLOAT, b.fadd(mean, eps))
    return b.fdiv(constant(FLOAT, 1.0), root)


def _total(b: Builder, x: Value) -> Value:
    """Add the lanes of a vector, each to the one half a vector away."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low, high = (
            b.shuffle_vector(x, x, ir.Constant(vector(I32, lanes), [*range(start, start + lanes)]))
            for start in (0, lanes)
        )
        x = b.fadd(low, high)
    return b.extract_element(x, constant(I32, 0))


def _sequence(b: Builder, f: dict[str, Value], end: str, number: Value) -> dict[str, Value]:
    """Read the line of the table with the first `end` above a number."""
    line = constant(I64, len(SEQUENCE))

    def count(turn: Value, passed: list[Value]) -> list[Value]:
        at = b.plus(b.mul(turn, line), SEQUENCE.index(end))
        other = b.read(b.at(f["table"], at, I64), I64, 8)
        return [b.add(passed[0], b.zext(b.icmp_unsigned("<=", other, number), I64))]

    first = b.mul(b.repeat(f["sequences"], [constant(I64, 0)], count)[0], line)
    return {
        name: b.read(b.at(f["table"], b.plus(first, n), I64), I64, 8)
        for n, name in enumerate(SEQUENCE)
    }


def _turn(
    b: Builder, f: dict[str, Value], row: Value, element: Element, cached: Element, kind: LayerKind
) -> None:
    """Write the norm and rotation of a row's queries and keys in place; store keys and values."""
    head_dim, kv_heads = kind.head_dim, f["kv_heads"]
    vectors = range(head_dim // LANES)
    is_rotated, is_normed = (
        b.icmp_signed("!=", f[name], constant(I32, 0)) for name in ("is_rotated", "is_normed")
    )
    first = b.times(b.mul(row, f["heads_of_row"]), head_dim)
    table = b.times(row, head_dim)
    turned = b.sub(f["heads_of_row"], kv_heads)
    queries = b.sub(turned, kv_heads)
    wholes: list[Value] = []
    if kind.norms_wholes:
        for start, heads in ((constant(I64, 0), queries), (queries, kv_heads)):
            at = b.plus(first, b.times(start, head_dim))
            size = b.times(heads, head_dim)
            squares = _squares(b, element, f["heads"], at, size)
            wholes.append(b.splat(_inverse_root(b, squares, size, f["eps"]), LANES))

    def head(turn: Value, _: list[Value]) -> list[Value]:
        at = b.plus(first, b.times(turn, head_dim))
        places = [b.plus(at, LANES * n) for n in vectors]
        before = b.block
        x = [element.read(b, f["heads"], place) for place in places]
        with b.if_then(is_normed):
            if wholes:
                inverse = b.select(b.icmp_unsigned("<", turn, queries), *wholes)
            else:
                squares = constant(FLOATS, 0.0)
                for part in x:
                    squares = b.fused(part, part, squares)
                size = constant(I64, head_dim)
                inverse = b.splat(_inverse_root(b, squares, size, f["eps"]), LANES)
            weights = b.times(turn, head_dim)
            normed = []
            for n, part in zip(vectors, x, strict=True):
                weight = WIDE.read(b, f["norms"], b.plus(weights, LANES * n))
                scaled = element.round(b, b.fmul(part, inverse))
                normed.append(element.round(b, b.fmul(scaled, weight)))
            after = b.block
        either = []
        for old, new in zip(x, normed, strict=True):
            either.append(b.phi(FLOATS))
            either[-1].add_incoming(old, before)
            either[-1].add_incoming(new, after)
        with b.if_else(is_rotated) as (then, otherwise):
            with then:
                for n, place in zip(vectors, places, strict=True):
                    cos, sin = (
                        element.read(b, f[name], b.plus(table, LANES * n))
                        for name in ("cos", "sin")
                    )
                    # The halves of a head change places, and the sines' signs do the rest.
                    other = either[(n + len(vectors) // 2) % len(vectors)]
                    element.write(b, f["heads"], place, b.fused(other, sin, b.fmul(either[n], cos)))
            with otherwise:
                for part, place in zip(either, places, strict=True):
                    element.write(b, f["heads"], place, part)
        return []

    b.repeat(turned, [], head)
    # Repeated rows of a lone token belong to no sequence.
    last = b.plus(b.times(f["sequences"], len(SEQUENCE)), SEQUENCE.index("row_end") - len(SEQUENCE))
    with b.if_then(b.icmp_unsigned("<", row, b.read(b.at(f["table"], last, I64), I64, 8))):
        own = _sequence(b, f, "row_end", row)
        column = b.sub(b.add(b.add(own["committed"], row), own["rows"]), own["row_end"])
        for name, start in (("keys", queries), ("values", turned)):
            source = b.plus(first, b.times(start, head_dim))
            storage = b.inttoptr(own[name], POINTER)

            def store(
                turn: Value, _: list[Value], source: Value = source, storage: Value = storage
            ) -> list[Value]:
                target = b.add(b.mul(turn, own["head_stride"]), b.mul(column, f["column_stride"]))
                for n in vectors:
                    at = b.plus(source, b.times(turn, head_dim))
                    x = element.read(b, f["heads"], b.plus(at, LANES * n))
                    cached.write(b, storage, b.plus(target, LANES * n), x)
                return []

            b.repeat(kv_heads, [], store)


def _gated(
    b: Builder,
    f: dict[str, Value],
    row: Value,
    element: Element,
    sharpen: Callable[[Builder, Value], Value],
) -> None:
    """Write activation(gate) * up of a row, which has the gates and then the factors."""
    size = f["size"]
    first, output = b.mul(row, b.times(size, 2)), b.mul(row, size)

    def step(turn: Value, _: list[Value]) -> list[Value]:
        column = b.times(turn, LANES)
        at = b.plus(first, column)
        gate = element.read(b, f["gate_up"], at)
        negative = b.fsub(constant(FLOATS, -0.0), sharpen(b, gate))
        bounded = _bounded(b, negative)
        active = element.round(b, b.fdiv(gate, b.fadd(constant(FLOATS, 1.0), _exp(b, bounded))))
        up = element.read(b, f["gate_up"], b.add(at, size))
        element.write(b, f["output"], b.plus(output, column), b.fmul(active, up))
        return []

    b.repeat(b.udiv(size, constant(I64, LANES)), [], step)


def _for_gelu(b: Builder, x: Value) -> Value:
    """Return 2 sqrt(2 / pi) (x + 0.044715 x^3): (1 + tanh(t / 2)) / 2 is 1 / (1 + exp(-t))."""
    cube = b.fmul(b.fmul(x, x), x)
    inner = b.fused(cube, constant(FLOATS, 0.044715), x)
    return b.fmul(inner, constant(FLOATS, 2 * math.sqrt(2 / math.pi)))


ACTIVATIONS: dict[str, Callable[[Builder, Value], Value]] = {
    "silu": lambda b, x: x,
    "gelu_pytorch_tanh": _for_gelu,
}
"""Activations x / (1 + exp(-t)), with the function that gives t."""


def _cap_row(b: Builder, f: dict[str, Value], row: Value, element: Element) -> None:
    """Write cap * tanh(x / cap) of a row in place."""
    first = b.mul(row, f["size"])

    def step(turn: Value, _: list[Value]) -> list[Value]:
        at = b.plus(first, b.times(turn, LANES))
        element.write(b, f["x"], at, _cap(b, element.read(b, f["x"], at), f["cap"]))
        return []

    b.repeat(b.udiv(f["size"], constant(I64, LANES)), [], step)


def _cap(b: Builder, x: Value, cap: Value) -> Value:
    """Return cap * tanh(x / cap), which is cap - 2 cap / (1 + exp(2 x / cap)), of 16 numbers."""
    two = constant(FLOATS, 2.0)
    cap = b.splat(cap, LANES)
    power = _exp(b, _bounded(b, b.fmul(b.fdiv(x, cap), two)))
    return b.fsub(cap, b.fdiv(b.fmul(cap, two), b.fadd(power, constant(FLOATS, 1.0))))


def _bounded(b: Builder, x: Value) -> Value:
    """Return 16 numbers, at most the largest with a finite exp."""
    largest = constant(FLOATS, -LEAST_EXPONENT)
    return b.select(b.fcmp_ordered(">", x, largest), largest, x)


def _exp(b: Builder, x: Value) -> Value:
    """Return exp(x) for numbers of at most 87; 0 for those below `LEAST_EXPONENT`."""
    even = constant(FLOATS, TO_EVEN)
    shifted = b.fadd(b.fmul(x, constant(FLOATS, LOG2_E)), even)
    whole = b.fsub(shifted, even)
    r = b.fused(whole, constant(FLOATS, -LN2_HIGH), x)
    r = b.fused(whole, constant(FLOATS, -LN2_LOW), r)
    value = constant(FLOATS, EXP[0])
    for coefficient in EXP[1:]:
        value = b.fused(value, r, constant(FLOATS, coefficient))
    one = constant(FLOATS, 1.0)
    value = b.fadd(b.fused(b.fmul(value, r), r, r), one)
    # The integer stands in the low bits of `shifted`, and is added to the exponent.
    exponent = b.shl(b.bitcast(shifted, INTEGERS), constant(INTEGERS, 23))
    scaled = b.bitcast(b.add(b.bitcast(value, INTEGERS), exponent), FLOATS)
    small = b.fcmp_ordered("<", x, constant(FLOATS, LEAST_EXPONENT))
    return b.select(small, constant(FLOATS, 0.0), scaled)


class Queries(NamedTuple):
    """A unit of `attend`: 16 queries of a group, each a row and a head, and its thread's memory."""

    sequence: dict[str, Value]  # line of the table
    kv_head: Value
    rows: list[Value]  # rows among the sequence's
    outputs: list[Value]  # where each query's output begins
    owned: list[Value]  # whether a lane has a query of its own, and no repeated one
    firsts: Value  # first and last column that each query sees
    lasts: Value
    begin: Value  # first column that any of them sees, and the one behind the last
    end: Value
    numbers: Value  # addresses: the queries by dimension, later their outputs
    top: Value  # the largest score of each lane
    scores: Value  # the scores by column

    @classmethod
    def gather(
        cls, b: Builder, f: dict[str, Value], unit: Value, element: Element, head_dim: int
    ) -> Queries:
        """Write a unit's queries, times the scale of scores, to its thread's memory."""
        own = _sequence(b, f, "unit_end", unit)
        kv_heads, group = f["kv_heads"], f["group"]
        count = b.mul(own["rows"], group)
        blocks = b.udiv(b.plus(count, LANES - 1), constant(I64, LANES))
        unit = b.sub(b.add(unit, b.mul(blocks, kv_heads)), own["unit_end"])
        kv_head, block = b.udiv(unit, blocks), b.urem(unit, blocks)
        first_row, first_head = b.sub(own["row_end"], own["rows"]), b.mul(kv_head, group)
        top = b.at(f["scratch"], constant(I64, head_dim * LANES), FLOAT)
        scores = b.at(top, constant(I64, LANES), FLOAT)
        rows, outputs, owned = [], [], []
        firsts = lasts = constant(INTEGERS, 0)
        for lane in range(LANES):
            index = b.plus(b.times(block, LANES), lane)
            owned.append(b.icmp_unsigned("<", index, count))
            # Lanes after the last query repeat it, and are not written.
            index = b.lesser(index, b.sub(count, constant(I64, 1)))
            row = b.udiv(index, group)
            head = b.add(first_head, b.urem(index, group))
            rows.append(row)
            global_row = b.add(first_row, row)
            source = b.add(b.mul(global_row, f["stride"]), b.times(head, head_dim))
            width = b.times(b.mul(kv_heads, group), head_dim)
            outputs.append(b.add(b.mul(global_row, width), b.times(head, head_dim)))

            def copy(
                d: Value, _: list[Value], source: Value = source, lane: int = lane
            ) -> list[Value]:
                x = b.fmul(element.read_one(b, f["queries"], b.add(source, d)), f["scale"])
                b.store(x, b.at(f["scratch"], b.plus(b.times(d, LANES), lane), FLOAT), align=4)
                return []

            b.repeat(constant(I64, head_dim), [], copy)
            place = constant(I32, lane)
            first, last = (
                b.read(b.at(f["bounds"], b.plus(b.times(global_row, 2), n), I32), I32, 4)
                for n in range(2)
            )
            firsts = b.insert_element(firsts, first, place)
            lasts = b.insert_element(lasts, last, place)
        begin = b.zext(b.intrinsic("llvm.vector.reduce.smin.v16i32", I32, firsts), I64)
        last = b.intrinsic("llvm.vector.reduce.smax.v16i32", I32, lasts)
        return cls(
            sequence=own,
            kv_head=kv_head,
            rows=rows,
            outputs=outputs,
            owned=owned,
            firsts=firsts,
            lasts=lasts,
            begin=begin,
            end=b.plus(b.zext(last, I64), 1),
            numbers=f["scratch"],
            top=top,
            scores=scores,
        )

    def scores_of(self, b: Builder, column: Value) -> Value:
        """Return the address of a column's scores."""
        return b.at(self.scores, b.times(column, LANES), FLOAT)


def _attend(
    b: Builder, f: dict[str, Value], unit: Value, element: Element, cached: Element, kind: LayerKind
) -> None:
    """Write the attention of 16 queries of a group: units are vectors of lanes, then groups."""
    head_dim, stride = kind.head_dim, f["column_stride"]
    found = Queries.gather(b, f, unit, element, head_dim)
    own, begin, numbers = found.sequence, found.begin, found.numbers
    keys, values = (
        b.at(b.inttoptr(own[name], POINTER), b.mul(found.kv_head, own["head_stride"]), cached.kind)
        for name in ("keys", "values")
    )
    _score(b, f, found, keys, cached, kind)
    with b.if_then(b.icmp_unsigned("!=", own["mask"], constant(I64, 0))):
        _hide(b, found)
    largest = b.load(found.top, typ=FLOATS, align=4)

    def weigh(turn: Value, totals: list[Value]) -> list[Value]:
        at = found.scores_of(b, b.add(begin, turn))
        weight = _exp(b, b.fsub(b.read(at, FLOATS, 4), largest))
        b.store(weight, at, align=4)
        return [b.fadd(totals[0], weight)]

    length = b.sub(found.end, begin)
    total = b.repeat(length, [constant(FLOATS, 0.0)], weigh)[0]

    def outputs_of(turn: Value, _: list[Value]) -> list[Value]:
        first = b.times(turn, LANES)

        def add(key: Value, sums: list[Value]) -> list[Value]:
            column = b.add(begin, key)
            weight = b.read(found.scores_of(b, column), FLOATS, 4)
            base = b.add(b.mul(column, stride), first)
            return [
                b.fused(b.splat(cached.read_one(b, values, b.plus(base, n)), LANES), weight, x)
                for n, x in enumerate(sums)
            ]

        sums = b.repeat(length, [constant(FLOATS, 0.0)] * LANES, add)
        for n, x in enumerate(sums):
            at = b.at(numbers, b.times(b.plus(first, n), LANES), FLOAT)
            b.store(b.fdiv(x, total), at, align=4)
        return []

    b.repeat(constant(I64, head_dim // LANES), [], outputs_of)
    for lane, (owned, output) in enumerate(zip(found.owned, found.outputs, strict=True)):
        with b.if_then(owned):

            def scatter(
                d: Value, _: list[Value], lane: int = lane, output: Value = output
            ) -> list[Value]:
                x = b.read(b.at(numbers, b.plus(b.times(d, LANES), lane), FLOAT), FLOAT, 4)
                element.write(b, f["output"], b.add(output, d), x)
                return []

            b.repeat(constant(I64, head_dim), [], scatter)


def _score(
    b: Builder, f: dict[str, Value], found: Queries, keys: Value, cached: Element, kind: LayerKind
) -> None:
    """Write the scores of keys, and the largest one of each lane: 8 keys at once, then the rest."""
    hidden = constant(FLOATS, float("-inf"))

    def score(first: Value, size: int, largest: Value) -> Value:
        """Compute the scores of some keys; returns the largest of each lane."""
        bases = [b.mul(b.plus(first, n), f["column_stride"]) for n in range(size)]

        def step(d: Value, sums: list[Value]) -> list[Value]:
            query = b.read(b.at(found.numbers, b.times(d, LANES), FLOAT), FLOATS, 4)
            return [
                b.fused(b.splat(cached.read_one(b, keys, b.add(base, d)), LANES), query, total)
                for base, total in zip(bases, sums, strict=True)
            ]

        sums = b.repeat(constant(I64, kind.head_dim), [constant(FLOATS, 0.0)] * size, step)
        for n, total in enumerate(sums):
            column = b.splat(b.trunc(b.plus(first, n), I32), LANES)
            is_seen = b.and_(
                b.icmp_signed(">=", column, found.firsts), b.icmp_signed("<=", column, found.lasts)
            )
            total = _cap(b, total, f["cap"]) if kind.caps_scores else total
            seen = b.select(is_seen, total, hidden)
            b.store(seen, found.scores_of(b, b.plus(first, n)), align=4)
            largest = b.select(b.fcmp_ordered(">", seen, largest), seen, largest)
        return largest

    length = b.sub(found.end, found.begin)
    many = b.udiv(length, constant(I64, KEYS))
    b.store(hidden, found.top, align=4)
    for number, size, start in (
        (many, KEYS, found.begin),
        (b.urem(length, constant(I64, KEYS)), 1, b.add(found.begin, b.times(many, KEYS))),
    ):
        with b.if_then(b.icmp_unsigned(">", number, constant(I64, 0))):

            def turns(
                turn: Value, carried: list[Value], size: int = size, start: Value = start
            ) -> list[Value]:
                return [score(b.add(start, b.times(turn, size)), size, carried[0])]

            held = b.load(found.top, typ=FLOATS, align=4)
            b.store(b.repeat(number, [held], turns)[0], found.top, align=4)


def _hide(b: Builder, found: Queries) -> None:
    """Write what hides the new keys that are no ancestors, and finds the largest scores again."""
    own, hidden = found.sequence, constant(FLOATS, float("-inf"))
    committed, mask = own["committed"], b.inttoptr(own["mask"], POINTER)
    places = [b.mul(row, own["rows"]) for row in found.rows]

    def hide(turn: Value, _: list[Value]) -> list[Value]:
        seen = constant(vector(I8, LANES), 0)
        for lane, place in enumerate(places):
            byte = b.read(b.at(mask, b.add(place, turn)), I8)
            seen = b.insert_element(seen, byte, constant(I32, lane))
        at = found.scores_of(b, b.add(committed, turn))
        is_seen = b.icmp_unsigned("!=", seen, constant(vector(I8, LANES), 0))
        b.store(b.select(is_seen, b.read(at, FLOATS, 4), hidden), at, align=4)
        return []

    b.repeat(b.sub(found.end, committed), [], hide)

    def compare(turn: Value, carried: list[Value]) -> list[Value]:
        x = b.read(found.scores_of(b, b.add(found.begin, turn)), FLOATS, 4)
        return [b.select(b.fcmp_ordered(">", x, carried[0]), x, carried[0])]

    length = b.sub(found.end, found.begin)
    b.store(b.repeat(length, [hidden], compare)[0], found.top, align=4)
