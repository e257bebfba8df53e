// Antialiased bilinear resizing of one crop, line by line, with the sparse taps of a triangle.
//
// Every line of the crop is converted and resized horizontally once; a line of the result is a
// weighted sum of the few that are still held. A processor that can permute floats between two
// registers reads a run of neighboring pixels once for all outputs that need them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>
#if !defined(PORTABLE) && (defined(__AVX512F__) || defined(__AVX2__))
#define PERMUTE
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif

#ifdef PERMUTE
#ifdef __AVX512F__
typedef __m512 Floats;
typedef __m512i Indices;

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Indices load(const int32_t* from) { return _mm512_loadu_si512(from); }
inline void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
inline Indices next(Indices index) { return _mm512_add_epi32(index, _mm512_set1_epi32(1)); }

// Entries of `low` for 0 to 15, of `high` for 16 to 31.
inline Floats pick(Floats low, Floats high, Indices index) {
  return _mm512_permutex2var_ps(low, index, high);
}
#else
typedef __m256 Floats;
typedef __m256i Indices;

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline Indices load(const int32_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
inline Indices next(Indices index) { return _mm256_add_epi32(index, _mm256_set1_epi32(1)); }

// Entries of `low` for 0 to 7, of `high` for 8 to 15.
inline Floats pick(Floats low, Floats high, Indices index) {
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 as the sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                          _mm256_permutevar8x32_ps(high, index), upper);
}
#endif
#endif

// Which pixels make up each output along one side, and how much of each.
struct Taps {
  int64_t size, padded;         // outputs; rounded up to whole registers, the rest weighs nothing
  int64_t count = 0;            // taps of an output
  std::vector<int32_t> first;   // [output], pixel of the crop
  std::vector<float> weights;   // [tap][output]
  std::vector<int32_t> base;    // [register], first pixel that is read
  std::vector<int32_t> offset;  // [output], first minus base of its register
  bool near = false;            // whether two registers from base on hold all that is needed

  explicit Taps(int64_t outputs)
      : size(outputs), padded((outputs + kLanes - 1) / kLanes * kLanes), first(padded),
        base(padded / kLanes), offset(padded) {}

  const float* weight(int64_t tap) const { return weights.data() + tap * padded; }

  // Of the pixels [start, start + length) of a side; `scaled` multiplies all weights.
  void set(int64_t start, int64_t length, bool mirrored, float scaled) {
    const float scale = float(length) / float(size), support = std::max(scale, 1.0f);
    count = int64_t(std::ceil(2 * support));  // pixels strictly within the support, at most
    weights.assign(count * padded, 0.0f);
    for (int64_t o = 0; o < size; ++o) {
      // Rounded to float after each step, as torch does: the weights are then the oracle's.
      const float step = float(double(float(o) + 0.5f) * double(scale));
      const float center = float(double(start) + double(step));
      const int64_t from = int64_t(std::floor(double(center) - support - 0.5)) + 1;
      const int64_t low = std::max(from, start), at = mirrored ? size - 1 - o : o;
      float* weight = weights.data() + at;
      float sum = 0;
      for (int64_t k = 0; k < count; ++k) {
        const float distance = std::fabs((float(low + k) + 0.5f) - center);
        const bool inside = low + k < start + length;
        weight[k * padded] = inside ? std::max(1 - distance / support, 0.0f) : 0.0f;
        sum += weight[k * padded];
      }
      for (int64_t k = 0; k < count; ++k) weight[k * padded] *= scaled / sum;
      first[at] = int32_t(low - start);
    }
    std::fill(first.begin() + size, first.end(), first[size - 1]);
    set_registers();
  }

 private:
  void set_registers() {
    near = true;
    for (int64_t o = 0; o < padded; o += kLanes) {
      const auto [low, high] = std::minmax_element(&first[o], &first[o] + kLanes);
      const int32_t lowest = *low;
      base[o / kLanes] = lowest;
      near = near && *high - lowest + count <= 2 * kLanes;
      for (int64_t i = 0; i < kLanes; ++i) offset[o + i] = first[o + i] - lowest;
    }
  }
};

// One line of pixels, resized; `line` holds two registers more than the pixels.
template <int64_t COUNT>  // 0: any
inline void resize_line(const Taps& taps, const float* line, float* out) {
  const int64_t count = COUNT ? COUNT : taps.count;
#ifdef PERMUTE
  if (taps.near) {
    for (int64_t o = 0; o < taps.padded; o += kLanes) {
      const float* from = line + taps.base[o / kLanes];
      const Floats low = load(from), high = load(from + kLanes);
      Indices index = load(&taps.offset[o]);
      Floats sum = pick(low, high, index) * load(taps.weight(0) + o);
      for (int64_t k = 1; k < count; ++k) {
        index = next(index);
        sum += pick(low, high, index) * load(taps.weight(k) + o);
      }
      store(out + o, sum);
    }
    return;
  }
#endif
  for (int64_t o = 0; o < taps.padded; ++o) {
    const float* from = line + taps.first[o];
    float sum = from[0] * taps.weight(0)[o];
    for (int64_t k = 1; k < count; ++k) sum += from[k] * taps.weight(k)[o];
    out[o] = sum;
  }
}

inline float unit(float x) {  // into [0, 1]
  x = x < 0 ? 0 : x;
  return x > 1 ? 1 : x;
}

// The weighted sum of some lines.
inline void add_lines(const float* const* lines, const float* weights, int64_t count, int64_t size,
                      float* __restrict out) {
  const float *a = lines[0], *b = lines[1];
  const float u = weights[0], v = weights[1];
  if (count == 2) {
#pragma omp simd
    for (int64_t x = 0; x < size; ++x) out[x] = unit(u * a[x] + v * b[x]);
    return;
  }
#pragma omp simd
  for (int64_t x = 0; x < size; ++x) out[x] = u * a[x] + v * b[x];
  for (int64_t k = 2; k < count - 1; ++k) {
    const float *more = lines[k], w = weights[k];
#pragma omp simd
    for (int64_t x = 0; x < size; ++x) out[x] += w * more[x];
  }
  const float *last = lines[count - 1], w = weights[count - 1];
#pragma omp simd
  for (int64_t x = 0; x < size; ++x) out[x] = unit(out[x] + w * last[x]);
}

// The crop of one image after another; memory of one thread.
class Resizer {
 public:
  Resizer(int64_t channels, int64_t side, int64_t size)
      : channels_(channels), side_(side), columns_(size), rows_(size),
        line_(side + side + 2 * kLanes), lines_(), weights_() {}

  // `box`: top, left, height and width in whole pixels within the image.
  void begin(const uint8_t* image, const float box[4], bool mirrored) {
    const int64_t top = int64_t(box[0]), left = int64_t(box[1]), width = int64_t(box[3]);
    height_ = int64_t(box[2]), width_ = width;
    crop_ = image + top * side_ + left;
    columns_.set(left, width, mirrored, 1.0f);
    rows_.set(top, height_, false, 1.0f / 255);
    held_.resize(channels_ * rows_.count * columns_.padded);
    lines_.resize(rows_.count), weights_.resize(rows_.count);
    next_ = 0;
  }

  // Line y of each channel; to be asked for in order.
  void line(int64_t y, float* out, int64_t channel_stride) {
    const int64_t first = rows_.first[y], count = rows_.count;
    for (; next_ < std::min(first + count, height_); ++next_)
      for (int64_t c = 0; c < channels_; ++c) hold(c);
    for (int64_t k = 0; k < count; ++k) weights_[k] = rows_.weight(k)[y];
    for (int64_t c = 0; c < channels_; ++c) {
      // Beyond the crop the weight is 0, and any line will do.
      for (int64_t k = 0; k < count; ++k) lines_[k] = held(c, std::min(first + k, height_ - 1));
      add_lines(lines_.data(), weights_.data(), count, columns_.size, out + c * channel_stride);
    }
  }

 private:
  float* held(int64_t channel, int64_t row) {
    return held_.data() + (channel * rows_.count + row % rows_.count) * columns_.padded;
  }

  void hold(int64_t channel) {
    const uint8_t* row = crop_ + (channel * side_ + next_) * side_;
    float *line = line_.data(), *to = held(channel, next_);
#pragma omp simd
    for (int64_t x = 0; x < width_; ++x) line[x] = row[x];
    if (columns_.count == 2) resize_line<2>(columns_, line, to);
    else if (columns_.count == 3) resize_line<3>(columns_, line, to);
    else resize_line<0>(columns_, line, to);
  }

  int64_t channels_, side_, height_ = 0, width_ = 0, next_ = 0;
  const uint8_t* crop_ = nullptr;
  Taps columns_, rows_;
  std::vector<float> line_, held_;  // pixels of a line and zeros; [channel][line][output]
  std::vector<const float*> lines_;
  std::vector<float> weights_;
};

}  // namespace
