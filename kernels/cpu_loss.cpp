// Attention and clone loss of one image after another, and their gradient, on the CPU.
//
// An image is reduced to a few sums a position, the sums give its losses and the slopes of each
// position, and the gradient is written while the image is still in the cache. The formulas are
// those of reference.layer_losses; cpu_loss.py fills in Job and Data. One image is one task and has
// one order of sums: results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_loss_passes.h"

namespace {

constexpr double kAttentionEpsilon = 1e-6;  // as in reference.py
constexpr double kCosineEpsilon = 1e-8;     // of F.cosine_similarity
constexpr int64_t kStream = 2 << 20;        // bytes: a larger gradient leaves the cache anyway
constexpr int64_t kCache = 512 << 10;       // bytes: of a larger image only the end is still there

struct Activation {
  int64_t start, image, position, channel;  // offset of what counts, strides; in elements
};

// Mirrored in cpu_loss.py. The tables hold strides, in elements.
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

template <typename A>
struct Scratch {  // of one thread, every array at a cache line
  struct alignas(64) Line {
    A values[64 / sizeof(A)];
  };
  std::vector<Line> memory;
  Sums<A> slots, sums;
  Factors<A> factors;

  explicit Scratch(const Walk &walk) {
    constexpr int64_t values = 64 / sizeof(A);
    const int64_t few = walk.positions / values + 1, many = std::max(few, walk.slots / values);
    memory.resize(5 * few + 8 * many);
    Line *next = memory.data();
    const auto take = [&next](int64_t lines) { return (next += lines)[-lines].values; };
    sums = {take(few), take(few), take(few), take(few), take(few), 0};
    slots = {take(many), take(many), take(many), take(many), take(many), 0};
    factors = {take(many), take(many), take(many)};
  }
};

// From sums to losses and slopes, in double. Leaves d loss[0] / d a in sums.student, and alpha and
// beta of d loss[1] / d s = alpha s + beta t in sums.own and sums.other.
template <typename A>
void finish(const Job &job, const double weight[2], const Sums<A> &sums, double loss[2]) {
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
  if (job.clone == kMse) loss[1] = weight[1] * sums.square / (double(N) * job.channels);
  if (job.clone != kCosine) return;
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

template <typename A>
void set_factors(const Job &job, const Walk &walk, const Sums<A> &slopes, const double grad[2],
                 double clone_weight, Factors<A> factors) {
  const int64_t N = job.positions;
  const double mse = 2 * grad[1] * clone_weight / (double(N) * job.channels);
  for (int64_t n = 0; n < N; ++n) {
    const double slope = job.attention ? job.power * grad[0] * slopes.student[n] : 0;
    const double alpha = job.clone == kCosine ? grad[1] * slopes.own[n] : 0;
    factors.x[n] = A(job.power == 2 ? slope + alpha : alpha);
    factors.y[n] = A(job.clone == kCosine ? grad[1] * slopes.other[n] : mse);
    factors.z[n] = A(job.power == 2 ? 0 : slope);
  }
  for (int64_t k = N; k < walk.rows * N; k *= 2) {  // the same for each plane of a line
    std::copy_n(factors.x, k, factors.x + k);
    if (job.clone != kNone) std::copy_n(factors.y, k, factors.y + k);
    if (job.power != 2) std::copy_n(factors.z, k, factors.z + k);
  }
}

// The two passes with their template arguments chosen

template <typename T>
using Reduce = void (*)(const Walk &, Lines<const T>, Lines<const T>, WideOf<T>, Sums<WideOf<T>>,
                        Sums<WideOf<T>> &);
template <typename T>
using Write = void (*)(const Walk &, Lines<const T>, Lines<const T>, Lines<const T>, Lines<T>,
                       WideOf<T>, Factors<WideOf<T>>, bool);

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

template <typename T, int P, int CLONE>
Write<T> write_for(const Job &job) {
  return job.planes ? write_gradient<T, P, CLONE, true> : write_gradient<T, P, CLONE, false>;
}

template <typename T, int P>
Write<T> write_for(const Job &job) {
  if (job.clone == kMse) return write_for<T, P, kMse>(job);
  return job.clone == kCosine ? write_for<T, P, kCosine>(job) : write_for<T, P, kNone>(job);
}

template <typename T>
Write<T> write_for(const Job &job) {
  if (!job.attention || job.power == 2) return write_for<T, kTwo>(job);
  return job.power == 1 ? write_for<T, kOne>(job) : write_for<T, kAny>(job);
}

// All images of a layer

template <typename T>
T *at(char *data, int64_t offset) {
  return reinterpret_cast<T *>(data) + offset;
}

template <typename T>
Lines<T> lines_of(const Job &job, const Walk &walk, char *data, const Activation &of, int64_t b) {
  const int64_t step = job.planes ? walk.rows * of.channel : of.position;
  return {data ? at<T>(data, of.start + b * of.image) : nullptr, step};
}

Walk walk_of(const Job &job, const Data &data, int64_t element_bytes) {
  const int64_t N = job.positions, C = job.channels;
  const bool backwards = N * C * element_bytes * (data.teacher ? 2 : 1) > kCache;
  if (!job.planes) return {N, 1, N, C, C, 0, backwards};
  const auto dense = [N](char *given, const Activation &of) { return !given || of.channel == N; };
  int64_t rows = 1;
  if (dense(data.student, job.student) && dense(data.teacher, job.teacher) &&
      dense(data.trunk, job.trunk) && dense(data.out, job.out))
    while (rows * N < 512 || (rows * N < 1024 && rows * N % 16)) rows *= 2;
  const int64_t lines = (C + rows - 1) / rows, slots = (rows * N + 63) / 64 * 64;
  return {N, rows, lines, rows * N, (C - (lines - 1) * rows) * N, slots, backwards};
}

template <typename A>
void move_slopes(const Job &job, const Data &data, int64_t image, bool save, const Sums<A> &sums) {
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
  const Walk walk = walk_of(job, data, sizeof(T));
  const Reduce<T> reduce = reduce_for<T>(job, data.teacher);
  const Write<T> write = write_for<T>(job);
  const int64_t elements = job.images * job.positions * job.channels;
  const bool stream = data.out && !data.trunk && elements * int64_t(sizeof(T)) > kStream;
  double weight[2] = {};
  for (int row = 0; data.weights && row < 2; ++row)
    weight[row] = *at<A>(data.weights, row * job.weights[0]);
#pragma omp parallel
  {
    Scratch<A> scratch(walk);
    Sums<A> &sums = scratch.sums;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < job.images; ++b) {
      const auto s = lines_of<const T>(job, walk, data.student, job.student, b);
      const auto t = lines_of<const T>(job, walk, data.teacher, job.teacher, b);
      if (data.losses || !data.out) reduce(walk, s, t, A(job.power), scratch.slots, sums);
      if (data.losses) {
        const int64_t *power = job.teacher_power;
        for (int64_t n = 0; data.teacher_power && n < job.positions; ++n)
          sums.teacher[n] = *at<A>(data.teacher_power, b * power[0] + n * power[1]);
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
      set_factors(job, walk, sums, grad, weight[1], scratch.factors);
      write(walk, s, t, lines_of<const T>(job, walk, data.trunk, job.trunk, b),
            lines_of<T>(job, walk, data.out, job.out, b), A(job.power), scratch.factors, stream);
    }
    if (stream) finish_streaming();
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
