// Attention and clone loss of one image after another, and their gradient, on the CPU.
//
// An image is reduced to a few sums a position, the sums give its losses and the slopes of each
// position, and the gradient is written while the image is still in the cache. The formulas are
// those of reference.layer_losses; cpu_loss.py fills in Job and Data. One image is one task and has
// one order of sums: results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

constexpr double kAttentionEpsilon = 1e-6;  // as in reference.py
constexpr double kCosineEpsilon = 1e-8;     // of F.cosine_similarity

constexpr int64_t kStream = 2 << 20;        // bytes: a gradient beyond this leaves the cache anyway

enum Clone { kNone, kCosine, kMse };
enum Power { kOff, kOne, kTwo, kAny };

struct Activation {
  int64_t start, image, position, channel;  // offset of the first that counts, strides; elements
};

// Job and Data are mirrored in cpu_loss.py. Strides are in elements.
struct Job {
  int64_t images, positions, channels;
  Activation student, teacher, trunk, out;
  int64_t teacher_power[2];  // image, position
  int64_t weights[1];        // row
  int64_t losses[2];         // row, image
  int64_t coefficients[3];   // plane, image, position
  int64_t grad_losses[2];    // row, image
  double power;
  int32_t dtype, planes, clone, attention;  // dtype 0 float32, 1 float64, 2 bfloat16
};

struct Data {  // null: not there
  char *student, *teacher, *trunk, *out;
  char *teacher_power, *weights, *losses, *coefficients, *grad_losses;
};

// Vectors: 64 bytes where the processor has them. Sums are held in A, the data are T.

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

template <typename T>
inline Vector<WideOf<T>> load(const T *from, int64_t left) {  // zeros beyond the end
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

// Powers

template <typename V>
inline V magnitude(V x) {
  return x < 0 ? -x : x;
}

// x^power for x >= 0 and power > 0: 2^(power log2 x), by the series of atanh and exp.
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
  y = y < A(-bias) ? zero - A(bias) : y > A(bias + 1) ? zero + A(bias + 1) : y;
  const Bits whole = __builtin_convertvector(y + (y < 0 ? zero - A(0.5) : zero + A(0.5)), Bits);
  const Vector<A> part = (y - __builtin_convertvector(whole, Vector<A>)) * ln2;
  Vector<A> result = zero + 1;
  for (int k = terms; k >= 1; --k) result = result * (part * (A(1) / A(k))) + 1;
  result = x == 0 ? zero : result * (Vector<A>)((whole + bias) << mantissa);
  return x < std::numeric_limits<A>::infinity() ? result : x;  // infinity and NaN pass through
}

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

// An image as lines: the channels of one token, or the positions of `rows` planes in one piece.

template <typename T>
struct Lines {
  T *start;
  int64_t step;
};

struct Walk {
  int64_t positions, rows, lines, length, last_length, slots;
};

template <typename A>
struct Aligned {  // allocates whole cache lines
  using value_type = A;
  A *allocate(size_t n) {
    return static_cast<A *>(::operator new(n * sizeof(A), std::align_val_t(64)));
  }
  void deallocate(A *p, size_t) { ::operator delete(p, std::align_val_t(64)); }
};
template <typename A>
using Buffer = std::vector<A, Aligned<A>>;

template <typename A>
struct Sums {  // a position each, or a slot each: position k % positions of plane k / positions
  A *student, *teacher, *cross, *own, *other;
  double square;  // sum of (s - t)^2 of the image
};

template <typename A>
Sums<A> sums_in(Buffer<A> &memory) {
  const size_t size = memory.size() / 5;
  A *start = memory.data();
  return {start, start + size, start + 2 * size, start + 3 * size, start + 4 * size, 0};
}

// First pass: the sums over the channels

template <typename A, int P, int CLONE, bool TEACHER>
struct Terms {
  Vector<A> student{}, teacher{}, cross{}, own{}, other{}, square{};

  inline void add(Vector<A> s, Vector<A> t, A power) {
    if constexpr (P != kOff) student += power_of<P, A>(s, power);
    if constexpr (P != kOff && TEACHER) teacher += power_of<P, A>(t, power);
    if constexpr (CLONE == kMse) square += (s - t) * (s - t);
    if constexpr (CLONE == kCosine) cross += s * t, own += s * s, other += t * t;
  }

  inline void operator+=(const Terms &more) {
    student += more.student, teacher += more.teacher, square += more.square;
    cross += more.cross, own += more.own, other += more.other;
  }

  template <typename Visit>
  static inline void each(Visit visit) {  // of the terms in use, but for the sum of squares
    if constexpr (P != kOff) visit(&Sums<A>::student, &Terms::student);
    if constexpr (P != kOff && TEACHER) visit(&Sums<A>::teacher, &Terms::teacher);
    if constexpr (CLONE == kCosine) visit(&Sums<A>::cross, &Terms::cross);
    if constexpr (CLONE == kCosine) visit(&Sums<A>::own, &Terms::own);
    if constexpr (CLONE == kCosine) visit(&Sums<A>::other, &Terms::other);
  }
};

// Sums of a line in registers: element k in group[k / lanes % 4], lane k % lanes.
template <typename T, typename Sum>
inline void add_line(const T *own, const T *other, int64_t length, WideOf<T> power, Sum group[4]) {
  constexpr int64_t lanes = kLanes<WideOf<T>>;
  int64_t k = 0;
  const auto add = [&](Sum &sum, int64_t at) { sum.add(load(own + at), load(other + at), power); };
  for (; k + 4 * lanes <= length; k += 4 * lanes) {
    add(group[0], k), add(group[1], k + lanes);
    add(group[2], k + 2 * lanes), add(group[3], k + 3 * lanes);
  }
  const auto add_some = [&](Sum &sum, int64_t at) __attribute__((always_inline)) {
    if (at < length) sum.add(load(own + at, length - at), load(other + at, length - at), power);
  };
  add_some(group[0], k), add_some(group[1], k + lanes);
  add_some(group[2], k + 2 * lanes), add_some(group[3], k + 3 * lanes);
}

template <typename T, int P, int CLONE, bool TEACHER>
void reduce_tokens(const Walk &walk, Lines<const T> s, Lines<const T> t, WideOf<T> power,
                   Sums<WideOf<T>>, Sums<WideOf<T>> &sums) {
  using A = WideOf<T>;
  using Sum = Terms<A, P, CLONE, TEACHER>;
  sums.square = 0;
  for (int64_t n = 0; n < walk.lines; ++n) {
    const T *own = s.start + n * s.step, *other = TEACHER ? t.start + n * t.step : own;
    Sum group[4];
    add_line(own, other, walk.length, power, group);
    group[0] += group[1], group[2] += group[3], group[0] += group[2];
    Sum::each([&](auto array, auto term) { (sums.*array)[n] = total<A>(group[0].*term); });
    if constexpr (CLONE == kMse) sums.square += total<A>(group[0].square);
  }
}

// Sums of 32 lines by slot, then by position: short chains of additions keep the rounding small.
template <typename T, int P, int CLONE, bool TEACHER>
void reduce_planes(const Walk &walk, Lines<const T> s, Lines<const T> t, WideOf<T> power,
                   Sums<WideOf<T>> slots, Sums<WideOf<T>> &sums) {
  using A = WideOf<T>;
  using Sum = Terms<A, P, CLONE, TEACHER>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t N = walk.positions;
  const bool registers = walk.rows > 1 && 4 * lanes % N == 0;  // all slots fit into a group
  const auto keep = [&slots](int64_t k, const Sum &sum) {
    Sum::each([&](auto array, auto term) {
      const Vector<A> value = load(slots.*array + k) + sum.*term;
      std::memcpy(slots.*array + k, &value, sizeof value);
    });
  };
  sums.square = 0;
  Sum::each([&](auto array, auto) { std::fill_n(sums.*array, N, A(0)); });
  for (int64_t first = 0; first < walk.lines; first += 32) {
    Sum::each([&](auto array, auto) { std::fill_n(slots.*array, walk.slots, A(0)); });
    for (int64_t line = first; line < std::min(first + 32, walk.lines); ++line) {
      const int64_t length = line + 1 < walk.lines ? walk.length : walk.last_length;
      const T *own = s.start + line * s.step, *other = TEACHER ? t.start + line * t.step : own;
      Vector<A> square{};
      if (registers) {
        Sum group[4];
        add_line(own, other, length, power, group);
        keep(0, group[0]), keep(lanes, group[1]);
        keep(2 * lanes, group[2]), keep(3 * lanes, group[3]);
        square = (group[0].square + group[1].square) + (group[2].square + group[3].square);
      } else {
        for (int64_t k = 0; k < length; k += lanes) {
          Sum sum;
          sum.add(load(own + k, length - k), load(other + k, length - k), power);
          keep(k, sum);
          square += sum.square;
        }
      }
      if constexpr (CLONE == kMse) sums.square += total<A>(square);
    }
    Sum::each([&](auto array, auto) {
      A *from = slots.*array, *to = sums.*array;
      for (int64_t half = (registers ? 4 * lanes / N : walk.rows) / 2; half; half /= 2)
        for (int64_t k = 0; k < half * N; ++k) from[k] += from[k + half * N];
      for (int64_t n = 0; n < N; ++n) to[n] += from[n];
    });
  }
}

// Between the passes, in double: from sums to losses and slopes. Leaves d loss[0] / d a in
// sums.student, and alpha and beta of d loss[1] / d s = alpha s + beta t in sums.own and sums.other.
template <typename A>
void finish(const Job &job, const double weight[2], Sums<A> &sums, double loss[2]) {
  const int64_t N = job.positions;
  A *a = sums.student, *own = sums.own, *other = sums.other;
  const A *b = sums.teacher, *cross = sums.cross;
  loss[0] = loss[1] = 0;
  if (job.attention) {
    double a_square = 0, b_square = 0, distance = 0, along = 0;
#pragma omp simd reduction(+ : a_square, b_square)
    for (int64_t n = 0; n < N; ++n)
      a_square += double(a[n]) * a[n], b_square += double(b[n]) * b[n];
    const double a_norm = std::sqrt(a_square);
    const double a_scale = 1 / (a_norm + kAttentionEpsilon);
    const double b_scale = 1 / (std::sqrt(b_square) + kAttentionEpsilon);
#pragma omp simd reduction(+ : distance, along)
    for (int64_t n = 0; n < N; ++n) {
      const double difference = a[n] * a_scale - b[n] * b_scale;
      distance += difference * difference, along += difference * a[n];
    }
    loss[0] = weight[0] * distance;
    const double slope = 2 * weight[0] * a_scale;
    const double radial = a_norm > 0 ? slope * along * a_scale / a_norm : 0;
#pragma omp simd
    for (int64_t n = 0; n < N; ++n)
      a[n] = A(slope * (a[n] * a_scale - b[n] * b_scale) - radial * a[n]);
  }
  if (job.clone == kMse) {
    loss[1] = weight[1] * sums.square / (double(N) * job.channels);
  } else if (job.clone == kCosine) {
    double cosines = 0;
    for (int64_t n = 0; n < N; ++n) {
      const double norm = std::sqrt(double(own[n])), clamped = std::max(norm, kCosineEpsilon);
      const double teacher = std::max(std::sqrt(double(other[n])), kCosineEpsilon);
      const double cosine = cross[n] / (clamped * teacher), slope = weight[1] / N / clamped;
      cosines += cosine;
      own[n] = A(norm > 0 ? slope * cosine / norm : 0);
      other[n] = A(-slope / teacher);
    }
    loss[1] = -weight[1] * cosines / N;
  }
}

// Second pass: the gradient x s + y (s - t) + z |s|^(p-1) sign(s)

template <typename A>
struct Factors {  // a position each, or a slot each
  Buffer<A> x, y, z;
  explicit Factors(int64_t size) : x(size), y(size), z(size) {}
};

template <typename A>
void set_factors(const Job &job, const Sums<A> &slopes, const double grad[2], double clone_weight,
                 const Walk &walk, Factors<A> &factors) {
  const int64_t N = job.positions;
  const double constant = 2 * grad[1] * clone_weight / (double(N) * job.channels);
  for (int64_t n = 0; n < N; ++n) {
    const double slope = job.attention ? job.power * grad[0] * slopes.student[n] : 0;
    const double alpha = job.clone == kCosine ? grad[1] * slopes.own[n] : 0;
    const double beta = job.clone == kCosine ? grad[1] * slopes.other[n] : -constant;
    factors.x[n] = A((job.power == 2 ? slope : 0) + (job.clone == kCosine ? alpha + beta : 0));
    factors.y[n] = A(-beta);
    factors.z[n] = A(job.power == 2 ? 0 : slope);
  }
  for (auto factor : {&Factors<A>::x, &Factors<A>::y, &Factors<A>::z})
    for (int64_t k = N; k < walk.rows * N; k *= 2)  // the same for each plane of a line
      std::copy_n(&(factors.*factor)[0], k, &(factors.*factor)[k]);
}

template <typename T, int P, bool TEACHER, bool TRUNK, bool PLANES>
void write(const Walk &walk, Lines<const T> s, Lines<const T> t, Lines<const T> trunk, Lines<T> out,
           WideOf<T> power, const Factors<WideOf<T>> &factors, bool stream) {
  using A = WideOf<T>;
  // From the end: what the first pass read last is still in the cache.
  for (int64_t line = walk.lines - 1; line >= 0; --line) {
    const T *own = s.start + line * s.step, *other = TEACHER ? t.start + line * t.step : own;
    const T *before = TRUNK ? trunk.start + line * trunk.step : own;
    T *to = out.start + line * out.step;
    const int64_t length = line + 1 < walk.lines ? walk.length : walk.last_length;
    const bool aligned = stream && reinterpret_cast<uintptr_t>(to) % kBytes == 0;
    const auto of_line = [line](const Buffer<A> &factor) {
      return PLANES ? Vector<A>{} : Vector<A>{} + factor[line];
    };
    Vector<A> x = of_line(factors.x), y = of_line(factors.y), z = of_line(factors.z);
    for (int64_t k = 0; k < length; k += kLanes<A>) {
      const int64_t left = length - k;
      if constexpr (PLANES) x = load(&factors.x[k]), y = load(&factors.y[k]), z = load(&factors.z[k]);
      const Vector<A> student = load(own + k, left);
      Vector<A> value = x * student;
      if constexpr (TEACHER) value += y * (student - load(other + k, left));
      if constexpr (P != kTwo) value += z * slope_of<P, A>(student, power);
      if constexpr (TRUNK) value += load(before + k, left);
      store(to + k, value, left, aligned);
    }
  }
}

// Choice of the templates

template <typename T>
using Reduce = void (*)(const Walk &, Lines<const T>, Lines<const T>, WideOf<T>, Sums<WideOf<T>>,
                        Sums<WideOf<T>> &);
template <typename T>
using Write = void (*)(const Walk &, Lines<const T>, Lines<const T>, Lines<const T>, Lines<T>,
                       WideOf<T>, const Factors<WideOf<T>> &, bool);

template <typename T, int P, int CLONE, bool TEACHER>
Reduce<T> reduce_for(const Job &job) {
  return job.planes ? reduce_planes<T, P, CLONE, TEACHER> : reduce_tokens<T, P, CLONE, TEACHER>;
}

template <typename T, int P>
Reduce<T> reduce_for(const Job &job, bool teacher) {
  if (job.clone == kMse) return reduce_for<T, P, kMse, true>(job);
  if (job.clone == kCosine) return reduce_for<T, P, kCosine, true>(job);
  return teacher ? reduce_for<T, P, kNone, true>(job) : reduce_for<T, P, kNone, false>(job);
}

template <typename T>
Reduce<T> reduce_for(const Job &job, bool teacher) {
  if (!job.attention) return reduce_for<T, kOff>(job, teacher);
  if (job.power == 2) return reduce_for<T, kTwo>(job, teacher);
  return job.power == 1 ? reduce_for<T, kOne>(job, teacher) : reduce_for<T, kAny>(job, teacher);
}

template <typename T, int P, bool TEACHER>
Write<T> write_for(const Job &job, bool trunk) {
  if (trunk)
    return job.planes ? write<T, P, TEACHER, true, true> : write<T, P, TEACHER, true, false>;
  return job.planes ? write<T, P, TEACHER, false, true> : write<T, P, TEACHER, false, false>;
}

template <typename T, int P>
Write<T> write_for(const Job &job, bool trunk) {
  return job.clone == kNone ? write_for<T, P, false>(job, trunk) : write_for<T, P, true>(job, trunk);
}

template <typename T>
Write<T> write_for(const Job &job, bool trunk) {
  if (!job.attention || job.power == 2) return write_for<T, kTwo>(job, trunk);
  return job.power == 1 ? write_for<T, kOne>(job, trunk) : write_for<T, kAny>(job, trunk);
}

// All images of a layer

template <typename T>
T *at(char *data, int64_t offset) {
  return reinterpret_cast<T *>(data) + offset;
}

template <typename T>
Lines<T> lines_of(const Job &job, const Walk &walk, char *data, const Activation &of, int64_t image) {
  const int64_t step = job.planes ? walk.rows * of.channel : of.position;
  return {data ? at<T>(data, of.start + image * of.image) : nullptr, step};
}

Walk walk_of(const Job &job, const Data &data) {
  const int64_t N = job.positions, C = job.channels;
  if (!job.planes) return {N, 1, N, C, C, 0};
  const auto dense = [N](char *given, const Activation &of) { return !given || of.channel == N; };
  int64_t rows = 1;
  if (dense(data.student, job.student) && dense(data.teacher, job.teacher) &&
      dense(data.trunk, job.trunk) && dense(data.out, job.out))
    while (rows * N < 512 || (rows < 16 && rows * N % 16)) rows *= 2;
  const int64_t lines = (C + rows - 1) / rows;
  return {N, rows, lines, rows * N, (C - (lines - 1) * rows) * N, (rows * N + 63) / 64 * 64};
}

template <typename A>
void move_slopes(const Job &job, const Data &data, int64_t image, bool save, Sums<A> &sums) {
  int64_t plane = 0;
  const auto move = [&](A *slopes) {
    A *kept = at<A>(data.coefficients, plane++ * job.coefficients[0] + image * job.coefficients[1]);
    for (int64_t n = 0; n < job.positions; ++n, kept += job.coefficients[2])
      if (save) *kept = slopes[n];
      else slopes[n] = *kept;
  };
  if (job.attention) move(sums.student);
  if (job.clone == kCosine) move(sums.own), move(sums.other);
}

template <typename T>
void run_images(const Job &job, const Data &data) {
  using A = WideOf<T>;
  const Walk walk = walk_of(job, data);
  const Reduce<T> reduce = reduce_for<T>(job, data.teacher);
  const Write<T> write = write_for<T>(job, data.trunk);
  const bool stream = !data.trunk && job.images * job.positions * job.channels * sizeof(T) > kStream;
  double weight[2] = {};
  for (int row = 0; data.weights && row < 2; ++row)
    weight[row] = *at<A>(data.weights, row * job.weights[0]);
#pragma omp parallel
  {
    Buffer<A> slot_memory(5 * walk.slots), sum_memory(5 * job.positions);
    const Sums<A> slots = sums_in(slot_memory);
    Sums<A> sums = sums_in(sum_memory);
    Factors<A> factors(job.planes ? walk.slots : job.positions);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < job.images; ++b) {
      const auto s = lines_of<const T>(job, walk, data.student, job.student, b);
      const auto t = lines_of<const T>(job, walk, data.teacher, job.teacher, b);
      if (data.losses || !data.out) reduce(walk, s, t, A(job.power), slots, sums);
      if (data.losses) {
        for (int64_t n = 0; data.teacher_power && n < job.positions; ++n)
          sums.teacher[n] = *at<A>(data.teacher_power,
                                   b * job.teacher_power[0] + n * job.teacher_power[1]);
        double loss[2];
        finish(job, weight, sums, loss);
        for (int row = 0; row < 2; ++row)
          *at<A>(data.losses, row * job.losses[0] + b * job.losses[1]) = A(loss[row]);
      }
      if (data.coefficients) move_slopes(job, data, b, !data.out, sums);
      if (!data.out) continue;
      double grad[2] = {1, 1};
      for (int row = 0; data.grad_losses && row < 2; ++row)
        grad[row] = *at<A>(data.grad_losses, row * job.grad_losses[0] + b * job.grad_losses[1]);
      set_factors(job, sums, grad, weight[1], walk, factors);
      write(walk, s, t, lines_of<const T>(job, walk, data.trunk, job.trunk, b),
            lines_of<T>(job, walk, data.out, job.out, b), A(job.power), factors, stream);
    }
#ifdef __AVX__
    if (stream) _mm_sfence();  // streaming stores are ordered with nothing else
#endif
  }
}

}  // namespace

// Power maps: coefficients alone; forward: losses and coefficients; backward: coefficients and out;
// forward with gradient: losses and out.
extern "C" void run(const Job *job, const Data *data) {
  if (job->dtype == 0) run_images<float>(*job, *data);
  if (job->dtype == 1) run_images<double>(*job, *data);
  if (job->dtype == 2) run_images<bf16>(*job, *data);
}
