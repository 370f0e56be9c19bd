"""The code of products with weights of few bits, as LLVM's intermediate representation (IR).

A product of few rows waits for its weight, so the stored numbers are multiplied as they are, with
activations that are rounded to integers: sums of integers are exact in any order. The rule, for
every set of instructions, number of rows and number of threads:

    A group is 32 consecutive numbers x of a row. Its largest |x| is `top`.
    d = top / 127,  q = x * (127 / top) rounded to an integer, ties to even; groups of zeros have 0
    s = the sum of q * number over the group, less `half` * sum of q              in integers
    y = fma(float(s), scale * d, y)              in float32, group after group, in ascending order
    y = fma(least, d * float(sum of q), y)       next, for weights with least numbers

Scales and least numbers of 8 bits are first multiplied by their factors, which rounds nothing.

A group x of 1, -0.5 and zeros has d = 1 / 127 and q = 127, -64 and zeros. With the stored numbers
9, 7 and 8s, whose half is 8, s is 127 + 64 = 191, and the group adds 191 / 127 * scale to y, which
is 1.504 * scale for the exact 1.5 * scale.

The float operations are in one order, each rounded once. So a row's result depends on nothing but
the row and the weights. A group with NaN or an infinity has NaN as d: then the row's results are
NaN, which the check of logits reports. Numbers below `LEAST_TOP` count as zeros, because 127 / top
would overflow.

It is IR, not Python for Numba, because a product consists of one instruction that multiplies bytes
and adds their products to integers (`vpdpbusd`, `pmaddubsw`, `sdot`). Numba has no name for it, and
from the loop that means it LLVM makes ten instructions. The rest would be as long in Numba, which
takes ten times as long to import and compile. llvmlite alone has wheels for Linux, macOS and
Windows, and needs no compiler on the user's machine.
"""

from __future__ import annotations

from llvmlite import ir

from treeflash.low_bits import BLOCK_ROWS, GROUP, LINE, SHARING, LowBitFormat, lines_of_byte
from treeflash_cuda.cpu.ir_builder import (
    FLOAT,
    GENERIC,
    HALF,
    I1,
    I8,
    I16,
    I32,
    I64,
    POINTER,
    QUIET_NAN,
    TO_EVEN,
    VOID,
    Builder,
    Isa,
    Value,
    add_record_function,
    constant,
    declare_fork,
    like,
    task,
    vector,
)

ENTRY = "low_bit_linear"
"""The name of the function that `build` makes; see `_entry`."""
ROW_COUNTS = (8, 6, 4, 3, 2, 1)
"""Numbers of rows that a pass over a block multiplies at once."""
LEAST_TOP = 2.0**-100
INFINITY_BITS = 0x7F800000
SHARED_NUMBERS, SHARED_PRODUCTS = 1 << 18, 1 << 27
"""Least numbers to round, and least multiplications, for which threads share work: on two cores of
an AMD EPYC sharing takes longer below, since threads have to wake and to wait for each other."""
READ_ROWS = 4
"""Rows whose multiplications take as long as reading the weight."""
CHUNKS = 8
"""Parts of a product for each thread: the fastest one takes more of them."""


OPERANDS = {
    **dict.fromkeys(("x", "numbers", "scales", "least", "factors", "bias", "y"), POINTER),
    **dict.fromkeys(("q", "d", "starts", "lows"), POINTER),
    **dict.fromkeys(("rows", "width", "groups", "blocks"), I64),
}
ARGUMENTS = OPERANDS | {"wide": I32, "threads": I32}
FIELDS = OPERANDS | {"chunk": I64, "next": I64, "wide": I1}
"""Fields of a job, which the threads of a product share:

- x, y: (rows, 32 * groups) numbers, and `blocks` blocks of 16 in rows of `width` numbers, in
  float32 if `wide`, else in bfloat16
- numbers, scales, least, factors: a weight of `blocks` blocks, see `LowBitWeight.pack`
- bias: float32 numbers to add to the results of a row, after these are rounded; or null
- q, d: the rows' integers (int8), and their scales by group
- starts, lows: what does not depend on the weights: the rows' sums of q by scale as the integers
  that sums of products begin with (see `_start`), and d * float(sum of q) by group
- next: the row or block that the next thread takes, `chunk` blocks at once
"""
JOB = ir.LiteralStructType(list(FIELDS.values()))


class JobBuilder(Builder):
    """Adds instructions that read a job."""

    def field(self, job: Value, name: str) -> Value:
        """Return the address of a job's field."""
        indices = [constant(I32, 0), constant(I32, list(FIELDS).index(name))]
        return self.gep(job, indices, source_etype=JOB)

    def fields(self, job: Value, *names: str) -> list[Value]:
        """Read fields of a job."""
        return [self.load(self.field(job, name), typ=FIELDS[name]) for name in names]


def build(isa: Isa, kind: LowBitFormat, threads: bool) -> str:
    """Write the IR of the product for weights of a format, for one thread or several."""
    module = ir.Module("low_bits")
    quantise = task(module, "quantise", POINTER)
    _quantise(JobBuilder(quantise.append_basic_block()), quantise.args[0], isa, kind)
    passes = {rows: _pass(module, isa, kind, rows) for rows in ROW_COUNTS}
    multiply = task(module, "multiply", POINTER)
    _multiply(JobBuilder(multiply.append_basic_block()), multiply.args[0], passes)
    _entry(module, quantise, multiply, threads)
    return str(module)


def _entry(module: ir.Module, quantise: Value, multiply: Value, threads: bool) -> None:
    """Write the function that computes a product, from a job's fields and a number of threads.

    `GOMP_parallel` runs a task in all threads of PyTorch.
    """
    entry = ir.Function(module, ir.FunctionType(VOID, list(ARGUMENTS.values())), ENTRY)
    fork = declare_fork(module) if threads else None
    b = JobBuilder(entry.append_basic_block())
    arguments = dict(zip(OPERANDS, entry.args, strict=False))
    wide, count = entry.args[-2:]
    job = b.allocate(JOB)
    zero, one = constant(I64, 0), constant(I64, 1)
    is_wide = b.icmp_signed("!=", wide, constant(I32, 0))
    for name, value in (arguments | {"next": zero, "wide": is_wide}).items():
        b.store(value, b.field(job, name))
    rows, groups, blocks = (arguments[name] for name in ("rows", "groups", "blocks"))
    size, width = b.times(groups, GROUP), b.times(blocks, BLOCK_ROWS)
    several = b.icmp_signed(">", count, constant(I32, 1))

    def run(part: Value, numbers: Value, least: int, alone: Value, shared: Value) -> None:
        """Run a part here, or in all threads if it is large; each takes so many blocks at once."""
        if fork is None:
            b.store(alone, b.field(job, "chunk"))
            b.call(part, [job])
            return
        is_shared = b.and_(several, b.icmp_unsigned(">=", numbers, constant(I64, least)))
        b.store(b.select(is_shared, shared, alone), b.field(job, "chunk"))
        b.run(part, job, fork, count, is_shared)

    run(quantise, b.mul(rows, size), SHARED_NUMBERS, one, one)
    b.store(zero, b.field(job, "next"))
    parts = b.times(b.zext(count, I64), CHUNKS)
    few = constant(I64, READ_ROWS)
    counted = b.select(b.icmp_unsigned("<", rows, few), few, rows)
    products = b.mul(counted, b.mul(width, size))
    run(multiply, products, SHARED_PRODUCTS, blocks, b.plus(b.udiv(blocks, parts), 1))
    b.ret_void()
    add_record_function(entry)


def _has_signs(isa: Isa, kind: LowBitFormat) -> bool:
    """Return whether 128 is taken off stored numbers before products, whose bytes have signs."""
    return isa.signed and kind.bits == 8


def _start(isa: Isa, kind: LowBitFormat) -> int:
    """Return what a sum of products begins with, as a factor of the sum of q."""
    return (128 if _has_signs(isa, kind) else 0) - kind.half


def _quantise(b: JobBuilder, job: Value, isa: Isa, kind: LowBitFormat) -> None:
    """Write the task that rounds rows to integers."""
    x, q, d, starts, lows, rows, groups, wide = b.fields(
        job, "x", "q", "d", "starts", "lows", "rows", "groups", "wide"
    )
    start = _start(isa, kind)
    floats, integers = vector(FLOAT, GROUP), vector(I32, GROUP)
    with b.taking(b.field(job, "next"), constant(I64, 1), rows) as row:
        before = b.mul(row, groups)

        def group(turn: Value, _: list[Value]) -> list[Value]:
            number = b.plus(before, turn)
            first = b.times(number, GROUP)
            values = _read_numbers(b, x, first, wide, GROUP)
            # The bits of floats without signs are in the order of their sizes; NaN is above all.
            sizes = b.and_(b.bitcast(values, integers), constant(integers, 0x7FFFFFFF))
            bits = b.intrinsic(f"llvm.vector.reduce.umax.v{GROUP}i32", I32, sizes)
            top = b.bitcast(bits, FLOAT)
            finite = b.icmp_unsigned("<", bits, constant(I32, INFINITY_BITS))
            used = b.and_(finite, b.fcmp_ordered(">=", top, constant(FLOAT, LEAST_TOP)))
            inverse = b.fdiv(constant(FLOAT, 127.0), b.select(used, top, constant(FLOAT, 1.0)))
            values = b.select(b.splat(used, GROUP), values, constant(floats, 0.0))
            scaled = b.fmul(values, b.splat(inverse, GROUP))
            even = constant(floats, TO_EVEN)
            whole = b.fptosi(b.fsub(b.fadd(scaled, even), even), integers)
            b.store(b.trunc(whole, vector(I8, GROUP)), b.at(q, first), align=1)
            scale = b.fdiv(top, constant(FLOAT, 127.0))
            nan = b.bitcast(constant(I32, QUIET_NAN), FLOAT)
            scale = b.select(finite, scale, nan)
            b.store(scale, b.at(d, number, FLOAT))
            size = GROUP // kind.scales
            sums = []
            for part in range(kind.scales):
                mask = [ir.Constant(I32, size * part + lane) for lane in range(size)]
                own = b.shuffle_vector(whole, whole, ir.Constant(vector(I32, size), mask))
                sums.append(b.intrinsic(f"llvm.vector.reduce.add.v{size}i32", I32, own))
                if start:
                    at = b.plus(b.times(number, kind.scales), part)
                    b.store(b.times(sums[part], start), b.at(starts, at, I32))
            if kind.has_least:
                total = sums[0] if len(sums) == 1 else b.add(*sums)
                b.store(b.fmul(scale, b.sitofp(total, FLOAT)), b.at(lows, number, FLOAT))
            return []

        b.repeat(groups, [], group)
    b.ret_void()


def _read_numbers(b: JobBuilder, x: Value, first: Value, wide: Value, count: int) -> Value:
    """Read float32 or bfloat16 numbers as float32."""
    with b.if_else(wide) as (then, otherwise):
        with then:
            floats = b.read(b.at(x, first, FLOAT), vector(FLOAT, count), align=4)
            from_wide = b.block
        with otherwise:
            widened = b.widen(b.read(b.at(x, first, I16), vector(I16, count), align=2))
            from_half = b.block
    result = b.phi(floats.type)
    result.add_incoming(floats, from_wide)
    result.add_incoming(widened, from_half)
    return result


def _multiply(b: JobBuilder, job: Value, passes: dict[int, Value]) -> None:
    """Write the task that multiplies all rows with blocks."""
    rows, blocks, chunk = b.fields(job, "rows", "blocks", "chunk")
    with b.taking(b.field(job, "next"), chunk, blocks) as first:
        count = b.lesser(chunk, b.sub(blocks, first))

        def block(turn: Value, _: list[Value]) -> list[Value]:
            number = b.plus(first, turn)
            row: Value = constant(I64, 0)
            for size, function in passes.items():
                # As many passes of this size as there are rows for; after the first size at most
                # one or two.
                left = b.sub(rows, row)
                times = b.udiv(left, constant(I64, size))
                with b.if_then(b.icmp_unsigned(">", times, constant(I64, 0))):

                    def run(
                        turn: Value,
                        _: list[Value],
                        row: Value = row,
                        size: int = size,
                        function: Value = function,
                    ) -> list[Value]:
                        b.call(function, [job, b.plus(row, b.times(turn, size)), number])
                        return []

                    b.repeat(times, [], run)
                row = b.plus(row, b.times(times, size))
            return []

        b.repeat(count, [], block)
    b.ret_void()


def _pass(module: ir.Module, isa: Isa, kind: LowBitFormat, rows: int) -> ir.Function:
    """Write the function that multiplies some rows with a block."""
    function = task(module, f"pass_{rows}", POINTER, I64, I64)
    job, row, block = function.args
    b, parts = JobBuilder(function.append_basic_block()), range(BLOCK_ROWS // isa.lanes)
    floats = vector(FLOAT, isa.lanes)
    q, d, starts, lows, numbers, scales, least, factors = b.fields(
        job, "q", "d", "starts", "lows", "numbers", "scales", "least", "factors"
    )
    groups, width, bias, y, wide = b.fields(job, "groups", "width", "bias", "y", "wide")
    group_nbytes = kind.lines * BLOCK_ROWS * LINE
    # Weights are fetched `ahead` bytes before they are multiplied, every `stride` bytes, into a
    # cache as LLVM numbers them: 3 is the first one. This was fastest on two cores of an AMD EPYC.
    ahead, stride, cache = 4096, 64, 3
    if kind.bits == 8:
        ahead, stride, cache = 8192, 256 if rows == 1 else 64, 2
    numbers = b.at(numbers, b.times(b.mul(block, groups), group_nbytes))
    zero = constant(floats, 0.0)
    own_rows = [b.plus(row, r) for r in range(rows)]
    first_groups = [b.mul(r, groups) for r in own_rows]

    def group(turn: Value, totals: list[Value]) -> list[Value]:
        weights = b.at(numbers, b.times(turn, group_nbytes))
        for place in range(0, group_nbytes, stride):
            at = b.at(weights, constant(I64, ahead + place))
            options = (constant(I32, x) for x in (0, cache, 1))
            b.intrinsic("llvm.prefetch.p0", VOID, at, *options)
        places = [b.plus(first, turn) for first in first_groups]
        activations = [b.at(q, b.times(place, GROUP)) for place in places]
        row_scales = [
            b.splat(b.read(b.at(d, place, FLOAT), FLOAT, 4), isa.lanes) for place in places
        ]
        group_number = b.plus(b.mul(block, groups), turn)

        def columns(base: Value, number: Value, factor: int) -> list[Value]:
            """Read scales, or least numbers, times one of the factors that they share."""
            found = _read_columns(b, isa, kind.scale_dtype, base, number)
            if not kind.factors:
                return found
            sharing = b.udiv(group_number, constant(I64, SHARING // GROUP))
            at = b.plus(b.times(sharing, kind.factors), factor)
            shared = _read_columns(b, isa, "float16", factors, at)
            return [b.fmul(x, y) for x, y in zip(found, shared, strict=True)]

        for scale in range(kind.scales):
            first: list[Value] = [constant(vector(I32, isa.lanes), 0)] * rows
            if _start(isa, kind):
                numbers_of = [b.plus(b.times(place, kind.scales), scale) for place in places]
                addresses = [b.at(starts, number, I32) for number in numbers_of]
                first = [b.splat(b.read(at, I32, 4), isa.lanes) for at in addresses]
            size = GROUP // LINE // kind.scales
            lines = range(size * scale, size * (scale + 1))
            products = _products(b, isa, kind, weights, activations, first, lines)
            at = b.plus(b.times(group_number, kind.scales), scale)
            steps = columns(scales, at, 0)
            for r, row_scale in enumerate(row_scales):
                for part in parts:
                    number = r * len(parts) + part
                    product = b.sitofp(products[number], floats)
                    step = b.fmul(steps[part], row_scale)
                    totals[number] = b.fused(product, step, totals[number])
        if kind.has_least:
            bounds = columns(least, group_number, 1)
            for r, place in enumerate(places):
                low = b.splat(b.read(b.at(lows, place, FLOAT), FLOAT, 4), isa.lanes)
                for part in parts:
                    number = r * len(parts) + part
                    totals[number] = b.fused(bounds[part], low, totals[number])
        return totals

    totals = b.repeat(groups, [zero] * (rows * len(parts)), lambda turn, x: group(turn, list(x)))
    for r, own_row in enumerate(own_rows):
        for part in parts:
            column = b.plus(b.times(block, BLOCK_ROWS), isa.lanes * part)
            at = b.plus(b.mul(own_row, width), column)
            total = _add_bias(b, bias, column, wide, totals[r * len(parts) + part])
            _write_numbers(b, y, at, wide, total)
    b.ret_void()
    return function


def _products(
    b: JobBuilder,
    isa: Isa,
    kind: LowBitFormat,
    weights: Value,  # address of a group
    activations: list[Value],  # addresses of the rows' integers of the group
    first: list[Value],  # vectors that the rows' sums begin with
    lines: range,  # the lines of numbers to multiply
) -> list[Value]:
    """Return the integer products of each row with a group's columns, in parts of a vector."""
    parts = range(BLOCK_ROWS // isa.lanes)
    totals = [total for total in first for _ in parts]
    for line in lines:
        columns = [_columns(b, isa, kind, weights, line, part) for part in parts]
        for r, row in enumerate(activations):
            place = constant(I64, line * LINE)
            four_numbers = b.splat(b.read(b.at(row, place), I32), isa.lanes)
            for part in parts:
                number = r * len(parts) + part
                totals[number] = _add_products(
                    b, isa, _has_signs(isa, kind), totals[number], columns[part], four_numbers
                )
    return totals


def _columns(
    b: JobBuilder, isa: Isa, kind: LowBitFormat, weights: Value, line: int, part: int
) -> Value:
    """Read a line's numbers of a part of the columns; see `treeflash.low_bits` for their places."""
    bytes_ = vector(I8, LINE * isa.lanes)

    def stored(line: int) -> Value:
        at = constant(I64, (line * BLOCK_ROWS + part * isa.lanes) * LINE)
        return b.read(b.at(weights, at), bytes_)

    if kind.bits == 8:
        has_signs = _has_signs(isa, kind)
        return b.xor(stored(line), constant(bytes_, 128)) if has_signs else stored(line)
    lower = stored(line // 2)
    lower = b.lshr(lower, constant(bytes_, 4)) if line % 2 else b.and_(lower, constant(bytes_, 15))
    if kind.bits == 4:
        return lower
    shared = lines_of_byte(kind.bits)
    upper = stored(GROUP // LINE // 2 + line // shared)
    shift = 4 - line % shared * (8 // shared)
    moved = (b.shl if shift > 0 else b.lshr)(upper, constant(bytes_, abs(shift)))
    return b.or_(lower, b.and_(moved, constant(bytes_, (1 << kind.bits) - 16)))


def _add_products(
    b: JobBuilder, isa: Isa, signed: bool, total: Value, columns: Value, row: Value
) -> Value:
    """Add to each int32 the products of four bytes of its column and four bytes of a row.

    The row's bytes have a sign, the columns' if `signed`; without one they have up to 6 bits with
    AVX2, whose sums of two products would otherwise not fit.
    """
    kind, bytes_ = total.type, columns.type
    if isa.name.endswith("VNNI"):
        name = f"llvm.x86.avx512.vpdpbusd.{32 * isa.lanes}"
        return b.intrinsic(name, kind, total, b.bitcast(columns, kind), row)
    row_bytes = b.bitcast(row, bytes_)
    if isa.name == "NEON":
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        return b.intrinsic(name, kind, total, columns, row_bytes)
    if isa.name == "AVX2":
        if signed:  # one factor has to have no sign, so the other one takes it
            row_bytes = b.intrinsic("llvm.x86.avx2.psign.b", bytes_, row_bytes, columns)
            columns = b.intrinsic("llvm.abs.v32i8", bytes_, columns, constant(I1, 0))
        pairs = vector(I16, 16)
        products = b.intrinsic("llvm.x86.avx2.pmadd.ub.sw", pairs, columns, row_bytes)
        ones = constant(pairs, 1)
        return b.add(total, b.intrinsic("llvm.x86.avx2.pmadd.wd", kind, products, ones))
    column = b.bitcast(columns, kind)
    for byte in range(LINE):
        left, right = constant(kind, 24 - 8 * byte), constant(kind, 24)
        own = b.and_(b.lshr(column, constant(kind, 8 * byte)), constant(kind, 255))
        total = b.add(total, b.mul(own, b.ashr(b.shl(row, left), right)))
    return total


def _read_columns(b: JobBuilder, isa: Isa, dtype: str, base: Value, number: Value) -> list[Value]:
    """Read what 16 columns have at a number as float32, in parts of a vector.

    The data type is float32, float16 or int8.
    """
    floats, found = vector(FLOAT, isa.lanes), []
    for part in range(BLOCK_ROWS // isa.lanes):
        at = b.plus(b.times(number, BLOCK_ROWS), part * isa.lanes)
        if dtype == "float32":
            found.append(b.read(b.at(base, at, FLOAT), floats, 4))
        elif dtype == "int8":
            found.append(b.sitofp(b.read(b.at(base, at), vector(I8, isa.lanes)), floats))
        elif isa is not GENERIC:
            found.append(b.fpext(b.read(b.at(base, at, HALF), vector(HALF, isa.lanes), 2), floats))
        else:
            found.append(_widen_halves(b, b.read(b.at(base, at, I16), vector(I16, isa.lanes), 2)))
    return found


def _widen_halves(b: JobBuilder, halves: Value) -> Value:
    """Return float16 numbers as float32, without an instruction for it.

    Exponent and fraction, moved to float32's place, are a number that is 2**112 times smaller.
    """
    floats, integers = like(halves, FLOAT), like(halves, I32)
    bits = b.zext(halves, integers)
    size = b.shl(b.and_(bits, constant(integers, 0x7FFF)), constant(integers, 13))
    value = b.fmul(b.bitcast(size, floats), constant(floats, 2.0**112))
    sign = b.shl(b.and_(bits, constant(integers, 0x8000)), constant(integers, 16))
    return b.bitcast(b.or_(b.bitcast(value, integers), sign), floats)


def _add_bias(b: JobBuilder, bias: Value, column: Value, wide: Value, total: Value) -> Value:
    """Add the bias of columns to results of a row, which are rounded to bfloat16 if not wide."""
    before = b.block
    with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(bias, I64), constant(I64, 0))):
        rounded = b.select(wide, total, b.widen(b.narrow(total)))
        added = b.fadd(rounded, b.read(b.at(bias, column, FLOAT), total.type, 4))
        after = b.block
    result = b.phi(total.type)
    result.add_incoming(total, before)
    result.add_incoming(added, after)
    return result


def _write_numbers(b: JobBuilder, y: Value, at: Value, wide: Value, values: Value) -> None:
    """Write float32 numbers, or round them to bfloat16, ties to even."""
    with b.if_else(wide) as (then, otherwise):
        with then:
            b.store(values, b.at(y, at, FLOAT), align=4)
        with otherwise:
            b.store(b.narrow(values), b.at(y, at, I16), align=2)
