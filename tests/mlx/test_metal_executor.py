"""The executor of Metal kernels: right kernels pass, and each kind of fault fails alone."""

import re
from dataclasses import replace

import numpy as np
import pytest

from treeflash.testing import require

require("mlx.core")

import mlx.core as mx
from metal_executor import (
    ASCENDING,
    DESCENDING,
    RANDOM,
    KernelSource,
    MetalCompileError,
    MetalKernelError,
    require_compiler,
)

require_compiler()

# The schedules without the check of every access: faults show in results, or end the kernel.
RESULTS_ALONE = (replace(ASCENDING, checks_accesses=False), DESCENDING, RANDOM)


def run(executor, body, *inputs, shape, dtype=mx.float32, threads, group=None, **settings):
    """The output `out` of a kernel with inputs `a`, `b`, `c`."""
    options = ("header", "ensure_row_contiguous", "atomic_outputs")
    made = {name: settings.pop(name) for name in options if name in settings}
    kernel = executor.metal_kernel("tried", list("abc"[: len(inputs)]), ["out"], body, **made)
    size = threads if isinstance(threads, tuple) else (threads, 1, 1)
    return kernel(
        inputs=inputs,
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=size,
        threadgroup=size if group is None else group,
        **settings,
    )[0]


# ----------------------------------------------------------------------------------- right kernels

ADD = """
    uint i = thread_position_in_grid.x;
    out[i] = a[elem_to_loc(int64_t(i), a_shape, a_strides, a_ndim)] + b[i];
"""


@pytest.mark.parametrize("contiguous", [False, True])
def test_strided_inputs(executor, rng, contiguous):
    whole = mx.array(rng.normal(size=(6, 8)).astype(np.float32))
    other = mx.array(rng.normal(size=48).astype(np.float32))
    for x in (whole, whole.T, whole[:, ::-1], whole[::2, 1:], mx.broadcast_to(whole[:1], (4, 8))):
        body = ADD if not contiguous else ADD.replace("ndim)]", "ndim) * (a_strides[1] == 1)]")
        found = run(
            executor,
            body,
            x,
            other,
            shape=(x.size,),
            threads=x.size,
            group=(5, 1, 1),  # the last group is smaller
            ensure_row_contiguous=contiguous,
        )
        assert mx.array_equal(found, x.reshape(-1) + other[: x.size])


SUM = """
    threadgroup float sums[32];
    uint t = thread_position_in_threadgroup.x;
    float x = simd_sum(a[thread_position_in_grid.x]);
    if (thread_index_in_simdgroup == 0)
        sums[simdgroup_index_in_threadgroup] = x;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (t < 32) {
        x = simd_sum(t < simdgroups_per_threadgroup ? sums[t] : 0.0f);
        if (t == 0)
            out[threadgroup_position_in_grid.x] = x;
    }
"""


def test_a_sum_over_threadgroups(executor, rng):
    x = mx.array(rng.normal(size=1000).astype(np.float32))
    found = run(executor, SUM, x, shape=(4,), threads=1000, group=(256, 1, 1))
    padded = np.pad(np.array(x, np.float64), (0, 24)).reshape(4, 256)
    np.testing.assert_allclose(found, padded.sum(1), rtol=1e-5, atol=1e-5)


MATMUL = """
    threadgroup T left[8 * K];
    uint lane = thread_index_in_simdgroup, tile = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y * 8;
    uint column = (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + tile) * 8;
    for (uint i = thread_index_in_threadgroup; i < 8 * K; i += threads_per_threadgroup.x)
        left[i] = a[row * K + i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_matrix<T, 8, 8> x, y;
    simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (uint k = 0; k < K; k += 8) {
        simdgroup_load(x, left + k, K);
        simdgroup_load(y, b + column * K + k, K, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(sum, x, y, sum);
    }
    uint r = (lane >> 4 & 1) * 4 + (lane >> 1 & 3), c = (lane >> 3 & 1) * 4 + (lane & 1) * 2;
    for (uint i = 0; i < 2; ++i)
        out[(row + r) * a_shape[0] * 2 + column + c + i] = sum.thread_elements()[i];
"""


def matmul(executor, rng, dtype, body=MATMUL):
    left, right = (rng.normal(size=(n, 24)).astype(np.float32) for n in (16, 32))
    left, right = (mx.array(x).astype(dtype) for x in (left, right))
    found = run(
        executor,
        body,
        left,
        right,
        shape=(16, 32),
        threads=(128, 2, 1),
        group=(64, 1, 1),
        template=[("T", dtype), ("K", 24)],
    )
    expected = np.array(left.astype(mx.float32)) @ np.array(right.astype(mx.float32)).T
    return np.array(found), expected


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_product_of_simdgroup_matrices(executor, rng, dtype):
    found, expected = matmul(executor, rng, dtype)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "(lane >> 4 & 1) * 4 + (lane >> 1 & 3)": "lane / 4",
            "(lane >> 3 & 1) * 4 + (lane & 1) * 2": "lane % 4 * 2",
        },
        {"out[(row + r)": "out[(row + c)", "column + c + i]": "column + r + i]"},
        {", ulong2(0, 0), true": ""},
    ],
)
def test_a_wrong_lane_layout_of_a_matrix_shows(executor, rng, changes):
    """In the results, or because two lanes write other values to one element."""
    body = MATMUL
    for right, wrong in changes.items():
        assert right in body
        body = body.replace(right, wrong)
    try:
        found, expected = matmul(executor, rng, mx.float32, body)
    except MetalKernelError:
        return
    assert not np.allclose(found, expected, rtol=0.1, atol=0.1)


def test_halves_are_rounded_as_numpy_rounds_them(executor, rng):
    bits = rng.integers(0, 2**32, 4000, np.uint32)
    bits[:1000] = 0x33000000 + bits[:1000] % 0x06000000  # subnormal halves
    x = np.concatenate(
        [bits.view(np.float32), np.arange(2**16, dtype=np.uint16).view(np.float16)[::37]]
    )
    x = x[~np.isnan(x)].astype(np.float32)
    body = "uint i = thread_position_in_grid.x; out[i] = static_cast<T>(a[i]);"
    settings = {"shape": x.shape, "threads": x.size, "group": (256, 1, 1)}
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    found = run(
        executor, body, mx.array(x), dtype=mx.float16, template=[("T", mx.float16)], **settings
    )
    np.testing.assert_array_equal(np.array(found), expected)
    found = run(
        executor, body, mx.array(x), dtype=mx.bfloat16, template=[("T", mx.bfloat16)], **settings
    )
    assert mx.array_equal(found, mx.array(x).astype(mx.bfloat16))
    y = rng.normal(size=(2, 500)).astype(np.float16)
    body = "uint i = thread_position_in_grid.x; out[i] = a[i] * b[i] + a[i] / b[i] - 3;"
    found = run(executor, body, *map(mx.array, y), shape=(500,), dtype=mx.float16, threads=500)
    np.testing.assert_array_equal(np.array(found), y[0] * y[1] + y[0] / y[1] - np.float16(3))
    z = [mx.array(row).astype(mx.bfloat16) for row in y]
    found = run(executor, body, *z, shape=(500,), dtype=mx.bfloat16, threads=500)
    assert mx.array_equal(found, z[0] * z[1] + z[0] / z[1] - 3)


def test_a_bfloat_needs_a_cast(executor):
    with pytest.raises(MetalCompileError, match="bfloat_value"):
        run(
            executor,
            "out[0] = a[0] * 2.0f;",
            mx.ones(9, mx.bfloat16),
            shape=(1,),
            dtype=mx.bfloat16,
            threads=1,
        )


OPERATIONS = {
    "simd_max(x)": lambda x: np.full(32, x.max()),
    "simd_min(x)": lambda x: np.full(32, x.min()),
    "quad_sum(x)": lambda x: np.repeat(x.reshape(8, 4).sum(1), 4),
    "simd_product(lane < 3 ? x : 1)": lambda x: np.full(32, x[:3].prod()),
    "simd_prefix_inclusive_sum(x)": np.cumsum,
    "simd_prefix_exclusive_sum(x)": lambda x: np.cumsum(x) - x,
    "simd_shuffle(x, 31 - lane)": lambda x: x[::-1],
    "simd_shuffle_xor(x, 5)": lambda x: x[np.arange(32) ^ 5],
    "simd_shuffle_down(x, 3)": lambda x: np.concatenate([x[3:], x[-3:]]),
    "simd_shuffle_up(x, 3)": lambda x: np.concatenate([x[:3], x[:-3]]),
    "simd_shuffle_rotate_down(x, 3)": lambda x: np.roll(x, -3),
    "simd_shuffle_rotate_up(x, 3)": lambda x: np.roll(x, 3),
    "simd_shuffle_and_fill_up(x, 7, 2)": lambda x: np.concatenate([[7, 7], x[:-2]]),
    "quad_shuffle_xor(x, 1)": lambda x: x[np.arange(32) ^ 1],
    "quad_broadcast(x, 2)": lambda x: np.repeat(x[2::4], 4),
    "simd_broadcast(x, 9)": lambda x: np.full(32, x[9]),
    "simd_broadcast_first(x)": lambda x: np.full(32, x[0]),
    "int(simd_is_first())": lambda x: np.arange(32) == 0,
    "int(simd_any(x == 3)) + 2 * int(simd_all(x < 50))": lambda x: np.full(32, 2 + (3 in x)),
    "int((simd_vote::vote_t)simd_ballot(x > 20) & 0x7fffffff)": lambda x: np.full(
        32, ((x > 20) << np.arange(32)).sum() & 0x7FFFFFFF
    ),
    "as_type<int>(as_type<float>(x)) + popcount(x) + clz(uint(lane + 1))": lambda x: (
        x + [int(i).bit_count() for i in x] + [32 - int(i).bit_length() for i in range(1, 33)]
    ),
    "extract_bits(uint(x), 1, 3) + max(x, 9) + clamp(x, 3, 5) + select(0, x, x > 7)": lambda x: (
        (x >> 1 & 7) + np.maximum(x, 9) + np.clip(x, 3, 5) + x * (x > 7)
    ),
    "int(dot(float3(float4(x, 1, 2, 3).yzw), float3(1)) + uint2(3, 4).y)": lambda x: x * 0 + 10,
    "int(vec<short, 2>(x)[1] * (float4(half4(x, 2, 3, 4)) + 1).z)": lambda x: x * 4,
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(executor, rng, operation):
    x = rng.integers(0, 40, 32).astype(np.int32)
    body = f"""
        int lane = thread_index_in_simdgroup;
        int x = a[lane];
        out[lane] = {operation};
    """
    found = run(executor, body, mx.array(x), shape=(32,), dtype=mx.int32, threads=32)
    np.testing.assert_array_equal(np.array(found), OPERATIONS[operation](x))


def test_attributes_scalars_and_small_arrays(executor):
    body = """
        uint3 p = thread_position_in_grid;
        uint i = (p.z * threads_per_grid.y + p.y) * threads_per_grid.x + p.x;
        out[i] = a + b[1] + 1000 * thread_index_in_threadgroup + FLAG * N
            + 100000 * threadgroup_position_in_grid.x;
    """
    template = [("FLAG", True), ("N", -3)]
    found = run(
        executor,
        body,
        20,
        mx.array([1.0, 7.0]),
        shape=(2, 3, 5),
        threads=(5, 3, 2),
        group=(4, 3, 1),
        template=template,
    )
    _, y, x = np.indices((2, 3, 5))
    width = np.where(x < 4, 4, 1)  # of the threadgroup
    expected = 24 + 1000 * (y * width + x % 4) + 100000 * (x // 4)
    np.testing.assert_array_equal(np.array(found), expected)


def test_atomic_outputs_and_initial_values(executor, rng):
    x = rng.integers(0, 5, 200).astype(np.int32)
    plain = "out[a[thread_position_in_grid.x]] += 1;"
    body = "atomic_fetch_add_explicit(&out[a[thread_position_in_grid.x]], 1, memory_order_relaxed);"
    settings = {"shape": (5,), "dtype": mx.int32, "threads": 200, "group": (64, 1, 1)}
    found = run(executor, body, mx.array(x), init_value=2, atomic_outputs=True, **settings)
    np.testing.assert_array_equal(np.array(found), np.bincount(x, minlength=5) + 2)
    with pytest.raises(MetalKernelError, match="race"):
        run(executor, plain, mx.array(x), init_value=2, **settings)


def test_threadgroup_memory_of_helpers_and_several_variables(executor):
    header = """
        inline float first(threadgroup const float* x, constant float& by) { return x[0] * by; }
    """
    body = """
        threadgroup float x[2][3], y[4]; threadgroup vec<float, 2> z;
        uint t = thread_position_in_threadgroup.x;
        if (t == 0) {
            for (int i = 0; i < 6; ++i) x[i / 3][i % 3] = i;
            y[3] = 5; z = float2(8, 9);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        threadgroup float* row = x[1];
        out[t] = first(row + 1, a) + y[3] + z.y;
    """
    found = run(executor, body, mx.array(2.0), header=header, shape=(40,), threads=40)
    np.testing.assert_array_equal(np.array(found), np.full(40, 22))


def test_the_source_is_the_one_that_mlx_writes(tmp_path, capfd):
    """MLX prints it while it exports a function, which it does without Metal too."""
    body = """
        uint i = thread_position_in_grid.x + thread_index_in_simdgroup;
        out[i] = T(a[i]) + a_shape[0] + a_strides[0] + a_ndim + b + c[0] + (FLAG ? N : 0);
    """
    inputs = [mx.zeros((3, 4), mx.bfloat16), mx.array(3), mx.array([1, 2])]
    template = [("T", mx.float32), ("FLAG", True), ("N", -3)]
    for settings in ({}, {"template": template}):
        for atomic in (False, True):
            kernel = mx.fast.metal_kernel(
                name="tried",
                input_names=list("abc"),
                output_names=["out"],
                source=body,
                header="// before\n",
                atomic_outputs=atomic,
            )

            def call(*arrays, kernel=kernel, settings=settings):
                return kernel(
                    inputs=list(arrays),
                    output_shapes=[(12,)],
                    output_dtypes=[mx.uint32],
                    grid=(12, 1, 1),
                    threadgroup=(4, 1, 1),
                    verbose=True,
                    **settings,
                )

            mx.export_function(str(tmp_path / "function"), call, *inputs)
            theirs = capfd.readouterr().out.split("```")[1]
            source = KernelSource.write(
                "tried",
                list(zip("abc", inputs, strict=True)),
                [("out", mx.uint32)],
                body,
                "// before\n",
                atomic_outputs=atomic,
                **settings,
            )
            names = re.compile(r"custom_kernel_\w+")
            mine = names.sub("kernel", source.metal)
            assert mine.strip() == names.sub("kernel", theirs).strip()


# ------------------------------------------------------------------------------------------ faults

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FAULTS = {
    "a missing barrier": (SUM.replace(BARRIER, ""), "nothing has written at line 9"),
    "a barrier for other memory": (SUM.replace("mem_threadgroup)", "mem_device)"), "race"),
    "a race between simdgroups": (
        """
            threadgroup float x[1];
            if (thread_index_in_simdgroup == 0)
                x[0] = simdgroup_index_in_threadgroup;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            out[thread_position_in_grid.x] = x[0];
        """,
        "race: writes threadgroup memory, which thread 0 has written",
    ),
    "a race within a simdgroup": (
        """
            threadgroup float x[256];
            uint t = thread_position_in_threadgroup.x;
            x[t] = a[t];
            simdgroup_barrier(mem_flags::mem_threadgroup);
            x[t] += x[t ^ 1];
            out[thread_position_in_grid.x] = x[t];
        """,
        "race: reads threadgroup memory, which thread 0 has written .*at line 6",
    ),
    "a race between threadgroups": (
        "out[thread_position_in_threadgroup.x] = a[thread_position_in_grid.x];",
        "race: two threadgroups use out",
    ),
    "a barrier in divergent control flow": (
        """
            if (thread_position_in_threadgroup.x < 64)
                threadgroup_barrier(mem_flags::mem_none);
            out[thread_position_in_grid.x] = 1;
        """,
        "threadgroup_barrier at line 3 is not reached by 192 of 256 threads",
    ),
    "two barriers": (
        """
            if (thread_position_in_threadgroup.x < 64)
                threadgroup_barrier(mem_flags::mem_none);
            else
                threadgroup_barrier(mem_flags::mem_none);
            out[thread_position_in_grid.x] = 1;
        """,
        "barrier of line 3, thread 64 at that of line 5",
    ),
    "divergent lanes": (
        """
            float x = 1;
            if (thread_index_in_simdgroup < 8)
                x = simd_sum(x);
            threadgroup_barrier(mem_flags::mem_none);
            out[thread_position_in_grid.x] = x;
        """,
        "divergent lanes: .*simd_sum at line 4",
    ),
    "a matrix without all lanes": (
        """
            if (thread_index_in_simdgroup == 5) return;
            simdgroup_float8x8 x = simdgroup_float8x8(1);
            simdgroup_multiply(x, x, x);
        """,
        "needs all 32 lanes, and 31 are active",
    ),
    "a shuffle from a lane that has returned": (
        """
            if (thread_index_in_simdgroup == 5) return;
            out[thread_position_in_grid.x] = simd_shuffle(1.0f, 5);
        """,
        "a lane that is not active",
    ),
    "uninitialised threadgroup memory": (
        "threadgroup float x[256]; out[thread_position_in_grid.x] = x[0];",
        "reads threadgroup memory, which nothing has written at line 1",
    ),
    "an output that is read first": (
        "out[thread_position_in_grid.x] += 1;",
        "reads out, which nothing has written",
    ),
    "an output that is not written": (
        "if (thread_position_in_grid.x != 77) out[thread_position_in_grid.x] = 1;",
        "output out depends on .*1 of 512 elements differ .*the first at 77",
    ),
    "a read after the end": (
        "uint i = thread_position_in_grid.x; out[i] = a[i + 1];",
        "reads out of bounds: 2048 bytes after the start of a, which has 2048 bytes",
    ),
    "a read before the start": (
        "int i = thread_position_in_grid.x; out[i] = a[i - 1];",
        "reads out of bounds: 4 bytes before the start of a",
    ),
    "a read far away": (
        "uint i = thread_position_in_grid.x; out[i] = a[(i - 1) * 1024 * 1024];",
        "accesses memory outside of its buffers at line 1|out of bounds",
    ),
    "a write after the end": ("out[thread_position_in_grid.x + 1] = 1;", "writes out of bounds"),
    "a write to an input": (
        "((device float*)a)[thread_position_in_grid.x] = 1;",
        "writes to the input a",
    ),
    "an index outside of an array": (
        "threadgroup float x[8], y[8]; x[thread_position_in_grid.x] = 1;",
        "index 8 is out of bounds of an array at line 1",
    ),
    "a pointer outside of a variable": (
        """
            threadgroup float x[8], y[8];
            threadgroup float* p = x;
            p[thread_position_in_threadgroup.x] = 1;
        """,
        "out of bounds: 32 bytes after the start of threadgroup memory, which has 32 bytes",
    ),
    "too much threadgroup memory": (
        "threadgroup float x[8193]; x[0] = 1; out[0] = x[0];",
        "needs 32772 bytes of threadgroup memory, and Metal has 32768",
    ),
    "a division by zero": ("out[0] = 1 / (int(a_shape[0]) - 512);", "divides an integer by zero"),
    "an endless loop": (
        "uint i = thread_position_in_grid.x; do out[i] = 1; while (a[i] == a[i]);",
        "does not end within 300 ms",
    ),
    "an endless loop of operations": (
        "while (simd_all(true)) {} out[0] = 1;",
        "does not end within 300 ms",
    ),
    "too large arrays": (
        "float x[70000]; for (int i = 0; i < 70000; ++i) x[i] = a[i % 512]; out[0] = x[int(a[1])];",
        "private memory",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails(executor, rng, fault):
    body, reason = FAULTS[fault]
    executor.max_seconds = 0.3
    x = mx.array(rng.integers(1, 9, 512).astype(np.float32))
    with pytest.raises(MetalKernelError, match=reason):
        run(executor, body, x, shape=(512,), threads=512, group=(256, 1, 1))


@pytest.mark.parametrize(
    "fault",
    [
        "a missing barrier",
        "a race between simdgroups",
        "a race within a simdgroup",
        "a race between threadgroups",
        "uninitialised threadgroup memory",
        "an output that is read first",
        "a read after the end",
        "a read before the start",
        "a write after the end",
    ],
)
def test_schedules_and_guard_pages_alone_find_a_fault(executor, rng, fault):
    executor.schedules = RESULTS_ALONE
    x = mx.array(rng.integers(1, 9, 512).astype(np.float32))
    with pytest.raises(MetalKernelError, match=r"depends on the order|outside of its buffers"):
        run(executor, FAULTS[fault][0], x, shape=(512,), threads=512, group=(256, 1, 1))


def test_an_error_names_the_kernel_the_schedule_the_thread_and_the_line(executor):
    with pytest.raises(MetalKernelError) as caught:
        run(
            executor,
            "uint i = thread_position_in_grid.x;\n  out[i] = a[i];",
            mx.ones(9),
            shape=(12,),
            threads=12,
        )
    assert str(caught.value) == (
        "kernel tried, ascending schedule: reads out of bounds: 36 bytes after the start of a, "
        "which has 36 bytes at line 2: out[i] = a[i]; (thread (9, 0, 0) of threadgroup (0, 0, 0))"
    )


def test_a_kernel_runs_after_one_that_failed(executor):
    """Its threads stopped in the middle, and the process goes on."""
    for _ in range(3):
        with pytest.raises(MetalKernelError):
            run(executor, "out[0] = *(device float*)nullptr;", shape=(1,), threads=64)
        found = run(executor, "out[thread_position_in_grid.x] = 3;", shape=(64,), threads=64)
        assert mx.array_equal(found, mx.full(64, 3.0))


def test_a_text_that_is_no_kernel_is_refused(executor):
    with pytest.raises(MetalCompileError, match="nothing_of_this_name"):
        run(executor, "out[0] = nothing_of_this_name;", shape=(1,), threads=1)


def test_without_a_compiler_the_tests_are_skipped_or_fail(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("TREEFLASH_REQUIRE_BACKENDS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="C\\+\\+ compiler"):
        require_compiler()
    monkeypatch.setenv("TREEFLASH_REQUIRE_BACKENDS", "1")
    with pytest.raises(pytest.fail.Exception, match="C\\+\\+ compiler"):
        require_compiler()
