// Metal's standard library as far as the kernels use it, for two passes of clang over their sources.
// Address spaces are real ones, so that clang refuses a pointer into the wrong space. Functions of
// the GPU have no body: the optimiser must neither remove a call nor look inside.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef _Float16 half;
typedef half float16_t;
typedef __bf16 bfloat;
typedef bfloat bfloat16_t;

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup static __attribute__((address_space(3)))
#define thread
#define INFINITY (__builtin_inff())

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float4 __attribute__((ext_vector_type(4)));
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));

// Not templates: arguments of two types are ambiguous, as in Metal.
#define ORDERED(T)                                  \
    inline T min(T a, T b) { return a < b ? a : b; } \
    inline T max(T a, T b) { return a > b ? a : b; }
ORDERED(short)
ORDERED(ushort)
ORDERED(int)
ORDERED(uint)
ORDERED(long)
ORDERED(ulong)
ORDERED(half)
ORDERED(float)

extern "C" __attribute__((const)) float gpu_exp(float);
extern "C" __attribute__((const)) float gpu_simd_sum(float);
extern "C" __attribute__((const)) float gpu_simd_shuffle_xor(float, ushort);
extern "C" __attribute__((const)) float2 gpu_multiply_accumulate(float2, float2, float2);
inline float exp(float x) { return gpu_exp(x); }
inline half exp(half x) { return gpu_exp(x); }
inline float simd_sum(float x) { return gpu_simd_sum(x); }
inline float simd_shuffle_xor(float x, ushort mask) { return gpu_simd_shuffle_xor(x, mask); }

// A thread has two elements of the matrices.
template <class T, int COLUMNS, int ROWS>
struct simdgroup_matrix {
    vec<T, 2> elements;
    vec<T, 2>& thread_elements() { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
template <class T, int COLUMNS, int ROWS = COLUMNS>
simdgroup_matrix<T, COLUMNS, ROWS> make_filled_simdgroup_matrix(T value) {
    simdgroup_matrix<T, COLUMNS, ROWS> matrix;
    matrix.elements = value;
    return matrix;
}
template <class A, class B>
void simdgroup_multiply_accumulate(
    simdgroup_float8x8& d,
    simdgroup_matrix<A, 8, 8> a,
    simdgroup_matrix<B, 8, 8> b,
    simdgroup_float8x8 c) {
    float2 left = {float(a.elements[0]), float(a.elements[1])};
    float2 right = {float(b.elements[0]), float(b.elements[1])};
    d.elements = gpu_multiply_accumulate(left, right, c.elements);
}

enum class mem_flags { mem_none, mem_threadgroup, mem_device };
extern "C" void gpu_threadgroup_barrier();
inline void threadgroup_barrier(mem_flags) { gpu_threadgroup_barrier(); }

}  // namespace metal

using namespace metal;
