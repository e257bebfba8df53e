// Color changes of one image, line by line: the formulas of color.py, branch-free.
//
// All changes are made while a line is in the cache. Only contrast needs a sum over the whole image
// as it is at that moment: it begins another pass.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

enum Kind { kBrightness, kContrast, kSaturation, kHue };

struct Change {
  int64_t kind;
  float amount;
};

// What was drawn for a batch, [image] or [image][4]; null: nothing changes.
struct Drawn {
  const uint8_t* jittered;
  const float* amounts;
  const int64_t* order;
  const uint8_t* gray;
};

// The changes of one image in their order.
struct Changes {
  Change change[4];
  int64_t count = 0;
  bool gray = false;

  Changes(const Drawn* drawn, int64_t image, int64_t channels) {
    if (!drawn) return;
    gray = channels == 3 && drawn->gray[image];
    for (int64_t place = 0; drawn->jittered[image] && place < 4; ++place) {
      const int64_t kind = drawn->order[4 * image + place];
      if (kind < 0 || kind >= (channels == 3 ? 4 : 2)) continue;
      const float amount = drawn->amounts[4 * image + kind];
      if (amount != 0) change[count++] = {kind, amount};
    }
  }

  bool some() const { return gray || count; }
  // Passes over the image: one more for each contrast.
  int64_t passes() const {
    int64_t contrasts = 0;
    for (int64_t i = 0; i < count; ++i) contrasts += change[i].kind == kContrast;
    return 1 + contrasts;
  }
};

// A line of an image: one channel or three, `stride` apart.
struct Line {
  float* start;
  int64_t channels, stride, length;
  float* channel(int64_t c) const { return start + c * stride; }
};

inline float within(float x) {  // [0, 1]
  x = x < 0 ? 0 : x;
  return x > 1 ? 1 : x;
}

inline float luma(float r, float g, float b) {  // ITU-R 601-2, as in color.py
  return 0.2989f * r + 0.587f * g + 0.114f * b;
}

inline void brighten(const Line& line, float amount) {
  const float factor = 1 + amount;
  for (int64_t c = 0; c < line.channels; ++c) {
    float* p = line.channel(c);
#pragma omp simd
    for (int64_t x = 0; x < line.length; ++x) p[x] = within(p[x] * factor);
  }
}

inline void add_contrast(const Line& line, float amount, float mean) {
  const float factor = 1 + amount;
  for (int64_t c = 0; c < line.channels; ++c) {
    float* p = line.channel(c);
#pragma omp simd
    for (int64_t x = 0; x < line.length; ++x) p[x] = within(mean + factor * (p[x] - mean));
  }
}

inline void saturate(const Line& line, float amount) {
  float *__restrict r = line.channel(0), *__restrict g = line.channel(1);
  float* __restrict b = line.channel(2);
  const float factor = 1 + amount;
#pragma omp simd
  for (int64_t x = 0; x < line.length; ++x) {
    const float gray = luma(r[x], g[x], b[x]);
    r[x] = within(gray + factor * (r[x] - gray));
    g[x] = within(gray + factor * (g[x] - gray));
    b[x] = within(gray + factor * (b[x] - gray));
  }
}

// high - chroma max(0, min(k, 4 - k, 1)), where k = t mod 6 and t > -6 and t < 18.
inline float hue_channel(float high, float chroma, float t) {
  t += t < 0 ? 6.0f : 0.0f;
  t -= t >= 12 ? 12.0f : t >= 6 ? 6.0f : 0.0f;
  return high - chroma * within(std::min(t, 4 - t));
}

inline void turn_hue(const Line& line, float amount) {
  float *__restrict r = line.channel(0), *__restrict g = line.channel(1);
  float* __restrict b = line.channel(2);
  const float turn = 6 * (amount - std::nearbyint(amount));
#pragma omp simd
  for (int64_t x = 0; x < line.length; ++x) {
    const float red = r[x], green = g[x], blue = b[x];
    const float high = std::max(red, std::max(green, blue));
    const float chroma = high - std::min(red, std::min(green, blue));
    const bool is_red = high == red, is_green = high == green;
    const float difference = is_red ? green - blue : is_green ? blue - red : red - green;
    const float start = is_red ? 0.0f : is_green ? 2.0f : 4.0f;
    const float sector = start + difference / std::max(chroma, 1e-12f);
    r[x] = hue_channel(high, chroma, 5 + sector + turn);
    g[x] = hue_channel(high, chroma, 3 + sector + turn);
    b[x] = hue_channel(high, chroma, 1 + sector + turn);
  }
}

inline void make_gray(const Line& line) {
  float *__restrict r = line.channel(0), *__restrict g = line.channel(1);
  float* __restrict b = line.channel(2);
#pragma omp simd
  for (int64_t x = 0; x < line.length; ++x) r[x] = g[x] = b[x] = luma(r[x], g[x], b[x]);
}

inline float total_luma(const Line& line) {
  const float* r = line.channel(0);
  float sum = 0;
  if (line.channels == 1) {
#pragma omp simd reduction(+ : sum)
    for (int64_t x = 0; x < line.length; ++x) sum += r[x];
    return sum;
  }
  const float *g = line.channel(1), *b = line.channel(2);
#pragma omp simd reduction(+ : sum)
  for (int64_t x = 0; x < line.length; ++x) sum += luma(r[x], g[x], b[x]);
  return sum;
}

inline void make(const Change& change, const Line& line, float mean) {
  switch (change.kind) {
    case kBrightness: return brighten(line, change.amount);
    case kContrast: return add_contrast(line, change.amount, mean);
    case kSaturation: return saturate(line, change.amount);
    default: return turn_hue(line, change.amount);
  }
}

// Fills an image and makes its changes, in as few passes as their order allows.
//
// `line_at(y)` is where a line is kept, `read` fills it, `write` takes it when all is done.
template <typename LineAt, typename Read, typename Write>
void make_changes(const Changes& changes, int64_t height, LineAt line_at, Read read, Write write) {
  const Change* change = changes.change;
  float mean = 0;
  for (int64_t pass = 0, from = 0;; ++pass) {
    int64_t to = from + (pass > 0);  // each pass but the first begins with a contrast
    while (to < changes.count && change[to].kind != kContrast) ++to;
    const bool last = to == changes.count;
    double sum = 0;
    for (int64_t y = 0; y < height; ++y) {
      const Line line = line_at(y);
      if (pass == 0) read(y, line);
      for (int64_t i = from; i < to; ++i) make(change[i], line, mean);
      if (!last) {
        sum += total_luma(line);
        continue;
      }
      if (changes.gray) make_gray(line);
      write(y, line);
    }
    if (last) return;
    mean = float(sum / (double(height) * line_at(0).length));
    from = to;
  }
}

}  // namespace
