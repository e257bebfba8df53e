// The two passes over one image: sums over its channels, then the gradient at every element.
//
// An image is walked in lines: the channels of one token, or the positions of some planes that are
// dense together. A line of planes holds slots: slot k is position k % positions.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu_loss_vector.h"

namespace {

enum Clone { kNone, kCosine, kMse };

template <typename T>
struct Lines {
  T *start;
  int64_t step;
};

struct Walk {
  int64_t positions, rows, lines, length, last_length, slots;  // rows: planes in a line
  bool backwards;  // in the second pass
};

template <typename A>
struct Sums {  // one a position, or one a slot
  A *student, *teacher;     // sum_c |s|^p, sum_c |t|^p
  A *cross, *own, *other;   // sum_c s t, s^2, t^2
  double square;            // of (s - t), over the image
};

template <typename A>
struct Factors {  // of the gradient: x of s, y of t or of s - t (MSE), z of |s|^(p-1) sign(s)
  A *x, *y, *z;  // one a position, or one a slot
};

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
  static inline void each(Visit visit) {  // of the terms in use, but for the square
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
  // Inlined by force: with its address taken the group would live in memory.
  const auto add_rest = [&](Sum &sum, int64_t at) __attribute__((always_inline)) {
    if (at < length) sum.add(load(own + at, length - at), load(other + at, length - at), power);
  };
  add_rest(group[0], k), add_rest(group[1], k + lanes);
  add_rest(group[2], k + 2 * lanes), add_rest(group[3], k + 3 * lanes);
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
  const int64_t rows = registers ? 4 * lanes / N : walk.rows;
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
      for (int64_t half = rows / 2; half; half /= 2)
        for (int64_t k = 0; k < half * N; ++k) from[k] += from[k + half * N];
      for (int64_t n = 0; n < N; ++n) to[n] += from[n];
    });
  }
}

template <typename T, int P, int CLONE, bool PLANES>
void write_gradient(const Walk &walk, Lines<const T> s, Lines<const T> t, Lines<const T> trunk,
                    Lines<T> out, WideOf<T> power, Factors<WideOf<T>> factors, bool stream) {
  using A = WideOf<T>;
  for (int64_t i = 0; i < walk.lines; ++i) {
    const int64_t line = walk.backwards ? walk.lines - 1 - i : i;
    const T *own = s.start + line * s.step, *other = CLONE != kNone ? t.start + line * t.step : own;
    const T *before = trunk.start ? trunk.start + line * trunk.step : nullptr;
    T *to = out.start + line * out.step;
    const int64_t length = line + 1 < walk.lines ? walk.length : walk.last_length;
    const bool aligned = stream && reinterpret_cast<uintptr_t>(to) % kBytes == 0;
    const auto of_line = [line](const A *factor) {
      return PLANES ? Vector<A>{} : Vector<A>{} + factor[line];
    };
    Vector<A> x = of_line(factors.x), y = of_line(factors.y), z = of_line(factors.z);
    for (int64_t k = 0; k < length; k += kLanes<A>) {
      const int64_t left = length - k;
      if constexpr (PLANES)
        x = load(factors.x + k), y = load(factors.y + k), z = load(factors.z + k);
      const Vector<A> value = load(own + k, left);
      Vector<A> gradient = x * value;
      if constexpr (CLONE == kMse) gradient += y * (value - load(other + k, left));
      if constexpr (CLONE == kCosine) gradient += y * load(other + k, left);
      if constexpr (P != kTwo) gradient += z * slope_of<P, A>(value, power);
      if (before) gradient += load(before + k, left);
      store(to + k, gradient, left, aligned);
    }
  }
}

}  // namespace
