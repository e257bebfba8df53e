// Short vectors for the CPU kernels, as wide as the processor's registers: loads, stores, powers.
//
// Vector types of GCC and Clang: any processor, no intrinsics but for streaming stores. Data are
// float, double or bfloat16 (T); what is computed with them is float or double (A).

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};

template <typename T>
using WideOf = std::conditional_t<std::is_same_v<T, bf16>, float, T>;

template <typename A, int BYTES = kBytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(BYTES)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;
template <typename A>
using Bit = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <typename A>
constexpr int64_t kLanes = kBytes / sizeof(A);

using Halves = VectorOf<uint16_t, kBytes / 2>::type;
using Words = Vector<uint32_t>;

template <typename T>
inline Vector<WideOf<T>> load(const T *from) {
  if constexpr (std::is_same_v<T, bf16>) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Vector<float>)(__builtin_convertvector(halves, Words) << 16);
  } else {
    Vector<T> vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
  }
}

// The first `left` elements, zeros behind them.
template <typename T>
inline Vector<WideOf<T>> load(const T *from, int64_t left) {
  constexpr int64_t lanes = kLanes<WideOf<T>>;
  if (__builtin_expect(left >= lanes, 1)) return load(from);
  T some[lanes] = {};
  for (int64_t i = 0; i < left; ++i) some[i] = from[i];
  return load(some);
}

template <typename T>
inline auto narrowed(Vector<WideOf<T>> vector) {
  if constexpr (std::is_same_v<T, bf16>) {  // to nearest even; a NaN stays one
    const Words word = (Words)vector;
    const Words nearest = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    return __builtin_convertvector(vector == vector ? nearest : (word >> 16 | 0x40), Halves);
  } else {
    return vector;
  }
}

// Stores at most `left` elements. `stream` leaves the cache alone; it needs an aligned address.
template <typename T>
inline void store(T *to, Vector<WideOf<T>> vector, int64_t left, bool stream) {
  const auto narrow = narrowed<T>(vector);
  if (__builtin_expect(left < kLanes<WideOf<T>>, 0)) {
    std::memcpy(to, &narrow, left * sizeof(T));
    return;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof narrow == 64)
    if (stream) return _mm512_stream_si512((__m512i *)to, (__m512i)narrow);
#endif
#if defined(__AVX__)
  if constexpr (sizeof narrow == 32)
    if (stream) return _mm256_stream_si256((__m256i *)to, (__m256i)narrow);
#endif
  std::memcpy(to, &narrow, sizeof narrow);
}

inline void finish_streaming() {  // streaming stores are ordered with nothing else
#ifdef __AVX__
  _mm_sfence();
#endif
}

template <typename A, int BYTES = kBytes>
inline A total(typename VectorOf<A, BYTES>::type vector) {  // pairwise
  if constexpr (BYTES == 16) {
    A sum = vector[0] + vector[1];
    if constexpr (sizeof(A) == 4) sum += vector[2] + vector[3];
    return sum;
  } else {
    typename VectorOf<A, BYTES / 2>::type half[2];
    std::memcpy(half, &vector, BYTES);
    return total<A, BYTES / 2>(half[0] + half[1]);
  }
}

template <typename V>
inline V magnitude(V x) {
  return x < 0 ? -x : x;
}

// x^power for x >= 0 and power > 0: 2^(power log2 x), by the series of atanh and exp. Relative
// error about 2e-8 |power log2 x| in float, 4e-17 |power log2 x| in double.
template <typename A>
inline Vector<A> raised(Vector<A> x, A power) {
  using Bits = Vector<Bit<A>>;
  constexpr bool single = sizeof(A) == 4;
  constexpr int mantissa = single ? 23 : 52, log_terms = single ? 5 : 10, terms = single ? 7 : 14;
  constexpr Bit<A> bias = single ? 127 : 1023, one = 1;
  constexpr A ln2 = A(0.69314718055994530942);
  const Vector<A> zero{};
  const Bits tiny = x < std::numeric_limits<A>::min();  // subnormal: scaled up first
  const Bits bits = (Bits)(tiny ? x * A(one << mantissa) : x);
  Vector<A> m = (Vector<A>)((bits & ((one << mantissa) - 1)) | (bias << mantissa));  // [1, 2)
  const Bits upper = m > A(1.41421356237309504880);
  m = upper ? m * A(0.5) : m;
  const Bits exponent = (bits >> mantissa) - bias - (tiny & mantissa) - upper;
  const Vector<A> f = (m - 1) / (m + 1), square = f * f;
  Vector<A> series = zero;
  for (int k = log_terms; k >= 0; --k) series = series * square + A(1) / A(2 * k + 1);
  Vector<A> y = power * (__builtin_convertvector(exponent, Vector<A>) + f * series * (2 / ln2));
  constexpr A lowest = -bias - mantissa, highest = bias + 2;
  y = y < lowest ? zero + lowest : y > highest ? zero + highest : y;
  const Bits whole = __builtin_convertvector(y + (y < 0 ? zero - A(0.5) : zero + A(0.5)), Bits);
  const Vector<A> part = (y - __builtin_convertvector(whole, Vector<A>)) * ln2;
  Vector<A> result = zero + 1;
  for (int k = terms; k >= 1; --k) result = result * (part * (A(1) / A(k))) + 1;
  const Bits half = whole >> 1;  // twice a half: neither overflows before the result does
  result *= (Vector<A>)((half + bias) << mantissa);
  result *= (Vector<A>)((whole - half + bias) << mantissa);
  result = x == 0 ? zero : result;
  return x < std::numeric_limits<A>::infinity() ? result : x;  // infinity and NaN pass through
}

enum Power { kOff, kOne, kTwo, kAny };

template <int P, typename A>
inline Vector<A> power_of(Vector<A> x, A power) {  // |x|^p
  if constexpr (P == kOne) return magnitude(x);
  if constexpr (P == kTwo) return x * x;
  return raised<A>(magnitude(x), power);
}

template <int P, typename A>
inline Vector<A> slope_of(Vector<A> x, A power) {  // |x|^(p-1) sign(x)
  const Vector<A> zero{};
  if constexpr (P == kOne) return x > 0 ? zero + 1 : x < 0 ? zero - 1 : x;
  const Vector<A> size = raised<A>(magnitude(x), power - 1);
  return x < 0 ? -size : size;
}

}  // namespace
