// The part of Metal's standard library that compute kernels use, for a C++ compiler.
//
// Threads meet in `scheduler.h`. No header of C's mathematics is included: its functions of double
// would take part in overload resolution, and Metal has no double.
#pragma once
#include <stdint.h>

#include <type_traits>

#include "scheduler.h"

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;

namespace metal {

using std::conditional_t, std::enable_if_t, std::is_floating_point_v, std::is_integral_v;
using std::is_same_v, std::is_signed_v, std::integral_constant, std::true_type, std::false_type;

template <class To, class From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// ---------------------------------------------------------------------------------------- numbers

inline uint16_t half_bits(float x) {
  const uint32_t bits = as_type<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return sign | 0x7e00;
  if (size >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (size < 0x38800000) {                       // a subnormal number: in units of 2^-24
    const float scaled = as_type<float>(size) * 16777216.0f;
    uint32_t whole = uint32_t(scaled);
    const float rest = scaled - float(whole);
    whole += rest > 0.5f || (rest == 0.5f && (whole & 1));
    return sign | whole;
  }
  const uint32_t rounded = size + 0xfff + (size >> 13 & 1);
  return sign | ((rounded - 0x38000000) >> 13);
}

inline float half_value(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, rest = half & 1023;
  if (exponent == 31) return as_type<float>(sign | 0x7f800000 | rest << 13);
  if (exponent == 0) return as_type<float>(sign | as_type<uint32_t>(float(rest) / 16777216.0f));
  return as_type<float>(sign | (exponent + 112) << 23 | rest << 13);
}

inline uint16_t bfloat_bits(float x) {
  const uint32_t bits = as_type<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float bfloat_value(uint16_t bits) { return as_type<float>(uint32_t(bits) << 16); }

// A number of 16 bits. Operations on two of a kind are rounded to that kind, as in Metal; one step
// through float rounds as a single rounding would. float becomes half without a cast, not bfloat.
template <uint16_t (*ENCODE)(float), float (*DECODE)(uint16_t), bool IMPLICIT>
struct short_float {
  uint16_t bits;

  short_float() = default;
  template <class T, enable_if_t<std::is_arithmetic_v<T> && (IMPLICIT || is_integral_v<T>), int> = 0>
  short_float(T x) : bits(ENCODE(float(x))) {}
  template <class T, enable_if_t<!IMPLICIT && is_floating_point_v<T>, long> = 0>
  explicit short_float(T x) : bits(ENCODE(float(x))) {}
  template <uint16_t (*E)(float), float (*D)(uint16_t), bool I>
  explicit short_float(short_float<E, D, I> x) : bits(ENCODE(float(x))) {}

  operator float() const { return DECODE(bits); }
  short_float operator-() const { return short_float(-float(*this)); }
#define METAL_OPERATOR(op)                                                             \
  friend short_float operator op(short_float a, short_float b) {                       \
    return short_float(float(a) op float(b));                                          \
  }                                                                                    \
  template <class T, enable_if_t<is_integral_v<T>, int> = 0>                           \
  friend short_float operator op(short_float a, T b) { return a op short_float(b); }   \
  template <class T, enable_if_t<is_integral_v<T>, int> = 0>                           \
  friend short_float operator op(T a, short_float b) { return short_float(a) op b; }   \
  template <class T, enable_if_t<is_floating_point_v<T>, int> = 0>                     \
  friend float operator op(short_float a, T b) { return float(a) op float(b); }        \
  template <class T, enable_if_t<is_floating_point_v<T>, int> = 0>                     \
  friend float operator op(T a, short_float b) { return float(a) op float(b); }        \
  template <class T>                                                                   \
  short_float& operator op##=(T x) { return *this = short_float(*this op x); }
  METAL_OPERATOR(+) METAL_OPERATOR(-) METAL_OPERATOR(*) METAL_OPERATOR(/)
#undef METAL_OPERATOR
};

using half = short_float<half_bits, half_value, true>;
using bfloat = short_float<bfloat_bits, bfloat_value, false>;

template <class T>
struct is_number : std::bool_constant<std::is_arithmetic_v<T>> {};
template <uint16_t (*E)(float), float (*D)(uint16_t), bool I>
struct is_number<short_float<E, D, I>> : true_type {};
template <class T>
constexpr bool is_number_v = is_number<T>::value;

template <class T>
struct numeric_limits {
  static constexpr T unsigned_max = T(~T(0));
  static constexpr T max() { return is_signed_v<T> ? T((ulong(1) << (8 * sizeof(T) - 1)) - 1) : unsigned_max; }
  static constexpr T min() { return is_signed_v<T> ? T(-max() - 1) : T(0); }
  static constexpr T lowest() { return min(); }
};
template <>
struct numeric_limits<float> {
  static constexpr float max() { return __FLT_MAX__; }
  static constexpr float min() { return __FLT_MIN__; }
  static constexpr float lowest() { return -__FLT_MAX__; }
  static constexpr float epsilon() { return __FLT_EPSILON__; }
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float quiet_NaN() { return __builtin_nanf(""); }
};
template <class T, uint16_t MAX, uint16_t MIN, uint16_t INFINITE>
struct short_limits {
  static T max() { return as_type<T>(MAX); }
  static T min() { return as_type<T>(MIN); }
  static T lowest() { return -max(); }
  static T infinity() { return as_type<T>(INFINITE); }
  static T quiet_NaN() { return T(__builtin_nanf("")); }
};
template <>
struct numeric_limits<half> : short_limits<half, 0x7bff, 0x0400, 0x7c00> {};
template <>
struct numeric_limits<bfloat> : short_limits<bfloat, 0x7f7f, 0x0080, 0x7f80> {};

// ---------------------------------------------------------------------------------------- vectors

// Neighbouring components of a vector, under their common name.
template <class T, int N, int FIRST, int COUNT>
struct part;

template <class T, int N>
struct vec_data {
  T v[N];
};
#define METAL_PARTS(N, ...)  \
  template <class T>         \
  struct vec_data<T, N> {    \
    union {                  \
      T v[N == 3 ? 4 : N];   \
      __VA_ARGS__            \
    };                       \
  };
METAL_PARTS(2, struct { T x, y; }; struct { T r, g; };)
METAL_PARTS(3, struct { T x, y, z; }; struct { T r, g, b; }; part<T, 3, 0, 2> xy; part<T, 3, 1, 2> yz;)
METAL_PARTS(4, struct { T x, y, z, w; }; struct { T r, g, b, a; }; part<T, 4, 0, 2> xy;
            part<T, 4, 1, 2> yz; part<T, 4, 2, 2> zw; part<T, 4, 0, 3> xyz; part<T, 4, 1, 3> yzw;)
#undef METAL_PARTS

template <class T, int N>
struct vec : vec_data<T, N> {
  using vec_data<T, N>::v;

  vec() = default;
  template <class U, enable_if_t<is_number_v<U>, int> = 0>
  vec(U x) {
    for (int i = 0; i < N; ++i) v[i] = T(x);
  }
  template <class U>
  explicit vec(const vec<U, N>& other) {
    for (int i = 0; i < N; ++i) v[i] = T(other.v[i]);
  }
  template <class A, class B, class... Rest>
  vec(A a, B b, Rest... rest) {
    int filled = 0;
    fill(filled, a), fill(filled, b), (fill(filled, rest), ...);
    if (filled != N) scheduler::metal_fail("a vector is made of another number of components");
  }
  vec(const vec&) = default;
  vec& operator=(const vec& other) {
    for (int i = 0; i < N; ++i) v[i] = other.v[i];
    return *this;
  }
  T& operator[](uint i) { return v[i]; }
  const T& operator[](uint i) const { return v[i]; }

 private:
  template <class U, enable_if_t<is_number_v<U>, int> = 0>
  void fill(int& filled, U x) {
    if (filled < N) v[filled] = T(x);
    ++filled;
  }
  template <class U, int M>
  void fill(int& filled, const vec<U, M>& x) {
    for (int i = 0; i < M; ++i) fill(filled, x.v[i]);
  }
  template <class U, int M, int F, int C>
  void fill(int& filled, const part<U, M, F, C>& x) { fill(filled, vec<U, C>(x)); }
};

template <class T, int N, int FIRST, int COUNT>
struct part {
  T v[N == 3 ? 4 : N];

  operator vec<T, COUNT>() const {
    vec<T, COUNT> x;
    for (int i = 0; i < COUNT; ++i) x.v[i] = v[FIRST + i];
    return x;
  }
  part& operator=(const vec<T, COUNT>& x) {
    for (int i = 0; i < COUNT; ++i) v[FIRST + i] = x.v[i];
    return *this;
  }
  part& operator=(const part& x) { return *this = vec<T, COUNT>(x); }
  part() = default;
  part(const part&) = default;
};

#define METAL_VECTOR_OPERATOR(op, Result)                                     \
  template <class T, int N>                                                   \
  vec<Result, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {        \
    vec<Result, N> out;                                                       \
    for (int i = 0; i < N; ++i) out.v[i] = a.v[i] op b.v[i];                  \
    return out;                                                               \
  }                                                                           \
  template <class T, int N, class U, enable_if_t<is_number_v<U>, int> = 0>    \
  vec<Result, N> operator op(const vec<T, N>& a, U b) { return a op vec<T, N>(b); } \
  template <class T, int N, class U, enable_if_t<is_number_v<U>, int> = 0>    \
  vec<Result, N> operator op(U a, const vec<T, N>& b) { return vec<T, N>(a) op b; }
#define METAL_VECTOR_ARITHMETIC(op) \
  METAL_VECTOR_OPERATOR(op, T)      \
  template <class T, int N, class U> \
  vec<T, N>& operator op##=(vec<T, N>& a, const U& b) { return a = a op b; }
METAL_VECTOR_ARITHMETIC(+) METAL_VECTOR_ARITHMETIC(-) METAL_VECTOR_ARITHMETIC(*)
METAL_VECTOR_ARITHMETIC(/) METAL_VECTOR_ARITHMETIC(%) METAL_VECTOR_ARITHMETIC(&)
METAL_VECTOR_ARITHMETIC(|) METAL_VECTOR_ARITHMETIC(^) METAL_VECTOR_ARITHMETIC(<<)
METAL_VECTOR_ARITHMETIC(>>)
METAL_VECTOR_OPERATOR(<, bool) METAL_VECTOR_OPERATOR(>, bool) METAL_VECTOR_OPERATOR(<=, bool)
METAL_VECTOR_OPERATOR(>=, bool) METAL_VECTOR_OPERATOR(==, bool) METAL_VECTOR_OPERATOR(!=, bool)
METAL_VECTOR_OPERATOR(&&, bool) METAL_VECTOR_OPERATOR(||, bool)
#undef METAL_VECTOR_ARITHMETIC
#undef METAL_VECTOR_OPERATOR
template <class T, int N>
vec<T, N> operator-(const vec<T, N>& a) {
  return vec<T, N>(0) - a;
}

#define METAL_VECTORS(type, name) \
  using name##2 = vec<type, 2>;   \
  using name##3 = vec<type, 3>;   \
  using name##4 = vec<type, 4>;
METAL_VECTORS(bool, bool) METAL_VECTORS(int8_t, char) METAL_VECTORS(uint8_t, uchar)
METAL_VECTORS(int16_t, short) METAL_VECTORS(uint16_t, ushort) METAL_VECTORS(int32_t, int)
METAL_VECTORS(uint32_t, uint) METAL_VECTORS(int64_t, long) METAL_VECTORS(uint64_t, ulong)
METAL_VECTORS(float, float) METAL_VECTORS(half, half) METAL_VECTORS(bfloat, bfloat)
#undef METAL_VECTORS

// ------------------------------------------------------------------------------------ mathematics

// A function of numbers and of vectors. What it computes in float, a half or bfloat rounds once.
#define METAL_FUNCTION_1(name, value)                                           \
  inline float name(float x) { return value; }                                  \
  template <uint16_t (*E)(float), float (*D)(uint16_t), bool I>                 \
  short_float<E, D, I> name(short_float<E, D, I> x) {                           \
    return short_float<E, D, I>(name(float(x)));                                \
  }                                                                             \
  template <class T, int N>                                                     \
  vec<T, N> name(vec<T, N> x) {                                                 \
    for (int i = 0; i < N; ++i) x.v[i] = name(x.v[i]);                          \
    return x;                                                                   \
  }
#define METAL_FUNCTIONS                                                                           \
  METAL_FUNCTION_1(exp, __builtin_expf(x)) METAL_FUNCTION_1(exp2, __builtin_exp2f(x))             \
  METAL_FUNCTION_1(exp10, __builtin_powf(10, x)) METAL_FUNCTION_1(log, __builtin_logf(x))         \
  METAL_FUNCTION_1(log2, __builtin_log2f(x)) METAL_FUNCTION_1(log10, __builtin_log10f(x))         \
  METAL_FUNCTION_1(sqrt, __builtin_sqrtf(x)) METAL_FUNCTION_1(rsqrt, 1 / __builtin_sqrtf(x))      \
  METAL_FUNCTION_1(sin, __builtin_sinf(x)) METAL_FUNCTION_1(cos, __builtin_cosf(x))               \
  METAL_FUNCTION_1(tan, __builtin_tanf(x)) METAL_FUNCTION_1(tanh, __builtin_tanhf(x))             \
  METAL_FUNCTION_1(sinh, __builtin_sinhf(x)) METAL_FUNCTION_1(cosh, __builtin_coshf(x))           \
  METAL_FUNCTION_1(asin, __builtin_asinf(x)) METAL_FUNCTION_1(acos, __builtin_acosf(x))           \
  METAL_FUNCTION_1(atan, __builtin_atanf(x)) METAL_FUNCTION_1(floor, __builtin_floorf(x))         \
  METAL_FUNCTION_1(ceil, __builtin_ceilf(x)) METAL_FUNCTION_1(trunc, __builtin_truncf(x))         \
  METAL_FUNCTION_1(round, __builtin_roundf(x)) METAL_FUNCTION_1(rint, __builtin_rintf(x))         \
  METAL_FUNCTION_1(fabs, __builtin_fabsf(x)) METAL_FUNCTION_1(fract, x - __builtin_floorf(x))     \
  METAL_FUNCTION_1(log1p, __builtin_log1pf(x)) METAL_FUNCTION_1(expm1, __builtin_expm1f(x))       \
  METAL_FUNCTION_1(saturate, x > 0 ? x < 1 ? x : 1 : 0)                                           \
  METAL_FUNCTION_1(sign, x > 0 ? 1 : x < 0 ? -1 : x)                                              \
  inline float pow(float x, float y) { return __builtin_powf(x, y); }                             \
  inline float powr(float x, float y) { return __builtin_powf(x, y); }                            \
  inline float atan2(float x, float y) { return __builtin_atan2f(x, y); }                         \
  inline float fmod(float x, float y) { return __builtin_fmodf(x, y); }                           \
  inline float divide(float x, float y) { return x / y; }                                         \
  inline float ldexp(float x, int n) { return __builtin_ldexpf(x, n); }                           \
  inline float copysign(float x, float y) { return __builtin_copysignf(x, y); }
METAL_FUNCTIONS
namespace precise {
METAL_FUNCTIONS
}
namespace fast {
METAL_FUNCTIONS
}
#undef METAL_FUNCTIONS
#undef METAL_FUNCTION_1

template <class T>
bool isnan(T x) { return __builtin_isnan(float(x)); }
template <class T>
bool isinf(T x) { return __builtin_isinf(float(x)); }
template <class T>
bool isfinite(T x) { return __builtin_isfinite(float(x)); }

// fmin and fmax drop NaN; min and max of floating-point numbers do the same.
template <class T, enable_if_t<is_number_v<T>, int> = 0>
T min(T a, T b) { return b < a || (a != a) ? b : a; }
template <class T, enable_if_t<is_number_v<T>, int> = 0>
T max(T a, T b) { return a < b || (a != a) ? b : a; }
template <class T>
T fmin(T a, T b) { return min(a, b); }
template <class T>
T fmax(T a, T b) { return max(a, b); }
template <class T, enable_if_t<is_number_v<T>, int> = 0>
T abs(T x) { return x < T(0) ? T(-x) : x; }
template <class T>
T clamp(T x, T low, T high) { return min(max(x, low), high); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <uint16_t (*E)(float), float (*D)(uint16_t), bool I, class F = short_float<E, D, I>>
F fma(short_float<E, D, I> a, F b, F c) { return F(__builtin_fmaf(float(a), float(b), float(c))); }
template <class T>
T mix(T a, T b, T share) { return a + (b - a) * share; }
template <class T>
T select(T no, T yes, bool chosen) { return chosen ? yes : no; }
template <class T>
T popcount(T x) { return T(__builtin_popcountll(ulong(std::make_unsigned_t<T>(x)))); }
template <class T>
T clz(T x) { return x == 0 ? T(8 * sizeof(T)) : T(__builtin_clzll(std::make_unsigned_t<T>(x)) - (64 - 8 * int(sizeof(T)))); }
template <class T>
T ctz(T x) { return x == 0 ? T(8 * sizeof(T)) : T(__builtin_ctzll(std::make_unsigned_t<T>(x))); }
template <class T>
T mulhi(T a, T b) { return T((conditional_t<is_signed_v<T>, __int128, unsigned __int128>(a) * b) >> (8 * sizeof(T))); }
template <class T>
T extract_bits(T x, uint offset, uint bits) { return bits == 0 ? T(0) : T(T(x << (8 * sizeof(T) - offset - bits)) >> (8 * sizeof(T) - bits)); }
template <class T>
T rotate(T x, T by) {
  constexpr T width = 8 * sizeof(T);
  const auto bits = std::make_unsigned_t<T>(x);
  return by % width == 0 ? x : T(bits << (by % width) | bits >> (width - by % width));
}

#define METAL_BY_COMPONENT(name)                                        \
  template <class T, int N>                                             \
  vec<T, N> name(vec<T, N> a, const vec<T, N>& b) {                     \
    for (int i = 0; i < N; ++i) a.v[i] = name(a.v[i], b.v[i]);          \
    return a;                                                           \
  }
METAL_BY_COMPONENT(min) METAL_BY_COMPONENT(max) METAL_BY_COMPONENT(pow) METAL_BY_COMPONENT(fmod)
#undef METAL_BY_COMPONENT
template <class T, int N>
vec<T, N> abs(vec<T, N> x) {
  for (int i = 0; i < N; ++i) x.v[i] = abs(x.v[i]);
  return x;
}
template <class T, int N>
vec<T, N> fma(vec<T, N> a, const vec<T, N>& b, const vec<T, N>& c) {
  for (int i = 0; i < N; ++i) a.v[i] = fma(a.v[i], b.v[i], c.v[i]);
  return a;
}
template <class T, int N>
vec<T, N> select(vec<T, N> no, const vec<T, N>& yes, const vec<bool, N>& chosen) {
  for (int i = 0; i < N; ++i) no.v[i] = chosen.v[i] ? yes.v[i] : no.v[i];
  return no;
}
template <class T, int N>
T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T sum = a.v[0] * b.v[0];
  for (int i = 1; i < N; ++i) sum += a.v[i] * b.v[i];
  return sum;
}
template <class T, int N>
T length(const vec<T, N>& a) { return sqrt(dot(a, a)); }
template <int N>
bool any(const vec<bool, N>& x) {
  bool found = false;
  for (int i = 0; i < N; ++i) found |= x.v[i];
  return found;
}
template <int N>
bool all(const vec<bool, N>& x) { return !any(x == vec<bool, N>(false)); }

// --------------------------------------------------------------------------- memory and barriers

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_device_and_threadgroup = 3 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  scheduler::metal_meet(scheduler::THREADGROUP_BARRIER, "threadgroup_barrier", line, int(flags), nullptr, 0);
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  scheduler::metal_meet(scheduler::SIMDGROUP_BARRIER, "simdgroup_barrier", line, int(flags), nullptr, 0);
}

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
using atomic_bool = atomic<bool>;

template <class T, class F>
T change_atomically(atomic<T>* object, F change) {
  scheduler::metal_atomic(true);
  volatile T* place = &object->value;
  const T old = *place;
  *place = change(old);
  scheduler::metal_atomic(false);
  return old;
}
#define METAL_ATOMIC(name, value)                                              \
  template <class T>                                                           \
  T atomic_##name##_explicit(atomic<T>* object, std::common_type_t<T> x, memory_order) { \
    return change_atomically(object, [x](T old) -> T { return value; });       \
  }
METAL_ATOMIC(fetch_add, old + x) METAL_ATOMIC(fetch_sub, old - x) METAL_ATOMIC(exchange, x)
METAL_ATOMIC(fetch_min, x < old ? x : old) METAL_ATOMIC(fetch_max, old < x ? x : old)
METAL_ATOMIC(fetch_and, old & x) METAL_ATOMIC(fetch_or, old | x) METAL_ATOMIC(fetch_xor, old ^ x)
METAL_ATOMIC(store, x)
#undef METAL_ATOMIC
template <class T>
T atomic_load_explicit(const atomic<T>* object, memory_order) {
  scheduler::metal_atomic(true);
  const T value = *const_cast<const volatile T*>(&object->value);
  scheduler::metal_atomic(false);
  return value;
}
template <class T>
bool atomic_compare_exchange_weak_explicit(atomic<T>* object, T* expected, std::common_type_t<T> x, memory_order, memory_order) {
  const T wanted = *expected;
  *expected = change_atomically(object, [=](T old) { return old == wanted ? x : old; });
  return *expected == wanted;
}

// ------------------------------------------------------------------------------------- simdgroups

template <class T>
struct Lanes {
  uint32_t active;
  T values[scheduler::LANES];

  bool has(uint lane) const { return lane < scheduler::LANES && (active >> lane & 1); }
  T at(uint lane) const {
    if (!has(lane)) scheduler::metal_fail("a shuffle reads a lane that is not active, or not there");
    return values[lane];
  }
};
inline uint own_lane() { return scheduler::metal_attributes().lane; }

template <class T>
Lanes<T> gather(const char* name, const T& value, int line, int kind = scheduler::OPERATION) {
  static_assert(sizeof(T) <= scheduler::SLOT);
  const scheduler::Offers* offers = scheduler::metal_meet(kind, name, line, 0, &value, sizeof(T));
  Lanes<T> lanes;
  lanes.active = offers->active;
  for (int i = 0; i < scheduler::LANES; ++i) __builtin_memcpy(&lanes.values[i], offers->values[i], sizeof(T));
  return lanes;
}

// Neighbours first, then pairs of neighbours: the order of a butterfly, equal in all lanes.
template <class T, class F>
T reduce(const Lanes<T>& lanes, F combine, int first, int count) {
  T values[scheduler::LANES];
  bool known[scheduler::LANES];
  for (int i = 0; i < count; ++i) values[i] = lanes.values[first + i], known[i] = lanes.has(first + i);
  for (; count > 1; count /= 2)
    for (int i = 0; i < count / 2; ++i) {
      const int a = 2 * i, b = a + 1;
      const T both = known[a] && known[b] ? T(combine(values[a], values[b])) : known[a] ? values[a] : values[b];
      values[i] = both, known[i] = known[a] || known[b];
    }
  return values[0];
}

#define METAL_LINE int line = __builtin_LINE()
#define METAL_REDUCTION(name, value)                                                  \
  template <class T>                                                                  \
  T simd_##name(T x, METAL_LINE) {                                                    \
    return reduce(gather("simd_" #name, x, line), [](T a, T b) { return value; }, 0, scheduler::LANES); \
  }                                                                                   \
  template <class T>                                                                  \
  T quad_##name(T x, METAL_LINE) {                                                    \
    return reduce(gather("quad_" #name, x, line), [](T a, T b) { return value; }, own_lane() & ~3, 4); \
  }
METAL_REDUCTION(sum, a + b) METAL_REDUCTION(product, a* b) METAL_REDUCTION(min, metal::min(a, b))
METAL_REDUCTION(max, metal::max(a, b)) METAL_REDUCTION(and, a& b) METAL_REDUCTION(or, a | b)
METAL_REDUCTION(xor, a ^ b)
#undef METAL_REDUCTION

#define METAL_PREFIX(name, start, op)                                                    \
  template <class T>                                                                     \
  T simd_prefix_exclusive_##name(T x, METAL_LINE) {                                      \
    const auto lanes = gather("simd_prefix_exclusive_" #name, x, line);                  \
    T out = T(start);                                                                    \
    for (uint i = 0; i < own_lane(); ++i) if (lanes.has(i)) out = T(out op lanes.values[i]); \
    return out;                                                                          \
  }                                                                                      \
  template <class T>                                                                     \
  T simd_prefix_inclusive_##name(T x, METAL_LINE) {                                      \
    return T(simd_prefix_exclusive_##name(x, line) op x);                                \
  }
METAL_PREFIX(sum, 0, +) METAL_PREFIX(product, 1, *)
#undef METAL_PREFIX

#define METAL_SHUFFLE(name, Index, lane)                                        \
  template <class T>                                                            \
  T simd_##name(T x, Index by, METAL_LINE) {                                    \
    const auto lanes = gather("simd_" #name, x, line);                          \
    return lanes.at(lane);                                                      \
  }                                                                             \
  template <class T>                                                            \
  T quad_##name(T x, Index by, METAL_LINE) {                                    \
    const auto lanes = gather("quad_" #name, x, line);                          \
    const uint quad = own_lane() & ~3, own = own_lane();                        \
    const uint other = (lane);                                                  \
    (void)own;                                                                  \
    return lanes.at(by < 4 && other >= quad && other < quad + 4 ? other : by < 4 ? quad + other : scheduler::LANES); \
  }
METAL_SHUFFLE(shuffle, ushort, by) METAL_SHUFFLE(broadcast, ushort, by)
METAL_SHUFFLE(shuffle_xor, ushort, own_lane() ^ by)
#undef METAL_SHUFFLE

// A lane whose source lies beyond either end keeps its own value.
template <class T>
T simd_shuffle_down(T x, ushort by, METAL_LINE) {
  const auto lanes = gather("simd_shuffle_down", x, line);
  return own_lane() + by < scheduler::LANES ? lanes.at(own_lane() + by) : x;
}
template <class T>
T simd_shuffle_up(T x, ushort by, METAL_LINE) {
  const auto lanes = gather("simd_shuffle_up", x, line);
  return own_lane() >= by ? lanes.at(own_lane() - by) : x;
}
template <class T>
T simd_shuffle_rotate_down(T x, ushort by, METAL_LINE) {
  return gather("simd_shuffle_rotate_down", x, line).at((own_lane() + by) % scheduler::LANES);
}
template <class T>
T simd_shuffle_rotate_up(T x, ushort by, METAL_LINE) {
  return gather("simd_shuffle_rotate_up", x, line).at((own_lane() + scheduler::LANES - by % scheduler::LANES) % scheduler::LANES);
}
template <class T>
T simd_shuffle_and_fill_up(T x, T filling, ushort by, METAL_LINE) {
  const auto lanes = gather("simd_shuffle_and_fill_up", x, line);
  const auto fillings = gather("simd_shuffle_and_fill_up", filling, line);
  return own_lane() >= by ? lanes.at(own_lane() - by) : fillings.at(scheduler::LANES - by + own_lane());
}
template <class T>
T simd_shuffle_and_fill_down(T x, T filling, ushort by, METAL_LINE) {
  const auto lanes = gather("simd_shuffle_and_fill_down", x, line);
  const auto fillings = gather("simd_shuffle_and_fill_down", filling, line);
  const uint lane = own_lane() + by;
  return lane < scheduler::LANES ? lanes.at(lane) : fillings.at(lane - scheduler::LANES);
}
template <class T>
T simd_broadcast_first(T x, METAL_LINE) {
  const auto lanes = gather("simd_broadcast_first", x, line);
  return lanes.at(__builtin_ctz(lanes.active));
}
inline bool simd_is_first(METAL_LINE) {
  return uint(__builtin_ctz(gather("simd_is_first", 0, line).active)) == own_lane();
}

struct simd_vote {
  using vote_t = uint64_t;
  uint64_t bits, active;
  explicit operator vote_t() const { return bits; }
  bool all() const { return bits == active; }
  bool any() const { return bits != 0; }
};
inline simd_vote vote(const char* name, bool x, int line) {
  const auto lanes = gather(name, x, line);
  uint32_t bits = 0;
  for (uint i = 0; i < scheduler::LANES; ++i) bits |= uint32_t(lanes.has(i) && lanes.values[i]) << i;
  return {bits, lanes.active};
}
inline simd_vote simd_ballot(bool x, METAL_LINE) { return vote("simd_ballot", x, line); }
inline simd_vote simd_active_threads_mask(METAL_LINE) { return vote("simd_active_threads_mask", true, line); }
inline bool simd_all(bool x, METAL_LINE) { return vote("simd_all", x, line).all(); }
inline bool simd_any(bool x, METAL_LINE) { return vote("simd_any", x, line).any(); }

// Each lane holds two neighbours of a row, at the place that Apple's GPUs give it.
template <class T, int ROWS = 8, int COLUMNS = 8>
struct simdgroup_matrix {
  static_assert(ROWS == 8 && COLUMNS == 8, "Apple's GPUs have matrices of 8 x 8");
  vec<T, 2> elements;

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) : elements(T(0)) {
    for (int i = 0; i < 2; ++i)
      if (row(own_lane()) == column(own_lane()) + i) elements[i] = diagonal;
  }
  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }
  static uint row(uint lane) { return (lane >> 4 & 1) * 4 + (lane >> 1 & 3); }
  static uint column(uint lane) { return (lane >> 3 & 1) * 4 + (lane & 1) * 2; }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T, int R, int C>
simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, R, C> m;
  m.elements = vec<T, 2>(x);
  return m;
}
template <class T, int R, int C>
simdgroup_matrix<T, R, C> make_diagonal_simdgroup_matrix(T x) { return simdgroup_matrix<T, R, C>(x); }

template <class T, class F>
void visit_elements(const char* name, T* place, ulong elements_per_row, ulong2 origin, bool transposed, int line, F visit) {
  gather(name, 0, line, scheduler::MATRIX_OPERATION);
  using Matrix = simdgroup_matrix<float>;
  const uint row = Matrix::row(own_lane()), column = Matrix::column(own_lane());
  for (uint i = 0; i < 2; ++i) {
    const ulong r = transposed ? column + i : row, c = transposed ? row : column + i;
    visit(i, place[(origin.y + r) * elements_per_row + origin.x + c]);
  }
}
template <class T, class U>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const U* source, ulong elements_per_row = 8, ulong2 origin = ulong2(0), bool transposed = false, METAL_LINE) {
  static_assert(is_same_v<T, std::remove_volatile_t<U>>, "a matrix is loaded from its own type");
  visit_elements("simdgroup_load", source, elements_per_row, origin, transposed, line, [&m](uint i, const U& x) { m.elements[i] = x; });
}
template <class T>
void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, T* target, ulong elements_per_row = 8, ulong2 origin = ulong2(0), bool transposed = false, METAL_LINE) {
  visit_elements("simdgroup_store", target, elements_per_row, origin, transposed, line, [&m](uint i, T& x) { x = m.elements[i]; });
}
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c, METAL_LINE) {
  struct Both { vec<A, 2> a; vec<B, 2> b; };
  const auto lanes = gather("simdgroup_multiply_accumulate", Both{a.elements, b.elements}, line, scheduler::MATRIX_OPERATION);
  using Matrix = simdgroup_matrix<float>;
  float left[8][8], right[8][8];
  for (uint lane = 0; lane < scheduler::LANES; ++lane)
    for (int i = 0; i < 2; ++i) {
      left[Matrix::row(lane)][Matrix::column(lane) + i] = float(lanes.values[lane].a.v[i]);
      right[Matrix::row(lane)][Matrix::column(lane) + i] = float(lanes.values[lane].b.v[i]);
    }
  for (int i = 0; i < 2; ++i) {
    float sum = float(c.elements[i]);
    for (int k = 0; k < 8; ++k) sum += left[Matrix::row(own_lane())][k] * right[k][Matrix::column(own_lane()) + i];
    d.elements[i] = D(sum);
  }
}
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b, METAL_LINE) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<D, 8, 8>(D(0)), line);
}

// A variable in threadgroup memory; `TAG` differs for each of them.
template <class T, int TAG>
T& threadgroup_variable() {
  static char key;
  return *static_cast<T*>(scheduler::metal_threadgroup_memory(&key, sizeof(T), alignof(T)));
}

}  // namespace metal

// ------------------------------------------------------------- what MLX puts before every kernel

using namespace metal;
using float16_t = metal::half;
using bfloat16_t = metal::bfloat;

template <class U>
struct Limits {
  static constexpr bool is_float = !is_integral_v<U>;
  static inline const U finite_max = numeric_limits<U>::max(), finite_min = numeric_limits<U>::lowest();
  static U infinite() {
    if constexpr (is_float) return numeric_limits<U>::infinity();
    else return numeric_limits<U>::max();
  }
  static inline const U max = infinite(), min = is_float ? U(-infinite()) : numeric_limits<U>::lowest();
};

template <class Index = int64_t>
Index elem_to_loc(Index element, const int* shape, const int64_t* strides, int ndim) {
  Index place = 0;
  for (int axis = ndim - 1; axis >= 0; --axis) {
    place += Index(element % shape[axis]) * Index(strides[axis]);
    element /= shape[axis];
  }
  return place;
}
template <class T, class U>
T ceildiv(T a, U b) { return (a + b - 1) / b; }

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
// Address spaces of pointers and references. Variables in threadgroup memory are rewritten before.
#define device
#define threadgroup
#define thread
#define METAL_FUNC inline
#define MLX_MTL_PRAGMA_UNROLL
#define MLX_MTL_CONST static constexpr
