// Bin codes of rows of floats: edges given, or K bins of equal mass.
//
// Values become integers of the same order, in which both zeros are one number; a code is then the
// number of thresholds that an integer reaches.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int64_t SMALL = 16;           // keys that are sorted by comparison
constexpr int64_t MOST_BUCKETS = 2048;  // that others are dealt to

template <typename Float>
using Key = std::conditional_t<sizeof(Float) == 4, int32_t, int64_t>;

// `value` must not be NaN.
template <typename Float>
Key<Float> key_of(Float value) {
  Key<Float> bits;
  value += 0;  // -0 becomes 0
  std::memcpy(&bits, &value, sizeof bits);
  const Key<Float> negative = bits >> (8 * sizeof bits - 1);  // -1 or 0, without a branch
  return bits ^ (negative & std::numeric_limits<Key<Float>>::max());
}

// Number of thresholds that each key reaches.
template <typename Int>
void count_reached(const std::vector<Int>& keys, const std::vector<Int>& thresholds,
                   uint8_t* codes) {
  constexpr size_t PART = 64;  // keys whose counts stay in registers
  Int part[PART] = {}, reached[PART];
  for (size_t n = 0; n < keys.size(); n += PART) {
    const size_t count = std::min(PART, keys.size() - n);
    std::copy_n(keys.data() + n, count, part);
    std::fill_n(reached, PART, 0);
    for (const Int threshold : thresholds) {
      for (size_t i = 0; i < PART; ++i) reached[i] += part[i] >= threshold;
    }
    std::copy_n(reached, count, codes + n);
  }
}

// Moves the runs of equal keys that hold `wanted` positions to where a sort would put them; keys[0]
// is at position `offset`. Only buckets that hold a wanted position are looked into again.
template <typename Int>
void settle(Int* keys, Int* spare, int64_t count, const std::vector<int64_t>& wanted,
            int64_t offset) {
  if (count <= SMALL) return std::sort(keys, keys + count);
  Int low = keys[0], high = keys[0];
  for (int64_t n = 0; n < count; ++n) {
    low = keys[n] < low ? keys[n] : low;
    high = keys[n] > high ? keys[n] : high;
  }
  if (low == high) return;
  using Bits = std::make_unsigned_t<Int>;
  const Bits range = Bits(high) - Bits(low), limit = std::min(count, MOST_BUCKETS);
  int shift = 0;
  while (range >> shift >= limit) ++shift;
  const auto bucket = [low, shift](Int key) { return (Bits(key) - Bits(low)) >> shift; };
  const Bits buckets = bucket(high) + 1;
  uint32_t sizes[MOST_BUCKETS], next[MOST_BUCKETS], end = 0;
  std::fill_n(sizes, buckets, 0);
  for (int64_t n = 0; n < count; ++n) ++sizes[bucket(keys[n])];
  for (Bits b = 0; b < buckets; end += sizes[b++]) next[b] = end;
  std::copy_n(keys, count, spare);
  for (int64_t n = 0; n < count; ++n) keys[next[bucket(spare[n])]++] = spare[n];
  auto position = std::lower_bound(wanted.begin(), wanted.end(), offset);
  while (position != wanted.end() && *position < offset + count) {
    const Bits own = bucket(keys[*position - offset]);
    const int64_t start = own ? next[own - 1] : 0, stop = next[own];
    settle(keys + start, spare, stop - start, wanted, offset + start);
    position = std::lower_bound(position, wanted.end(), offset + stop);
  }
}

// The lowest key of each bin but the first. An edge inside a run of equal keys moves to the nearer
// end of the run.
template <typename Int>
void equal_mass_thresholds(std::vector<Int>& keys, std::vector<Int>& spare,
                           const std::vector<int64_t>& edges, std::vector<Int>& thresholds) {
  settle(keys.data(), spare.data(), keys.size(), edges, 0);
  int64_t start = 0, end = 0;  // of the run
  for (size_t edge = 0; edge < edges.size(); ++edge) {
    const int64_t at = edges[edge];
    if (at >= end) {
      for (start = at; start > 0 && keys[start - 1] == keys[at];) --start;
      for (end = at + 1; end < int64_t(keys.size()) && keys[end] == keys[at];) ++end;
    }
    thresholds[edge] = at - start <= end - at ? keys[at] : keys[at] + 1;
  }
}

// `unordered[row]`: whether the row holds NaN; such a row gets no codes.
template <typename Float>
void equal_mass(const Float* values, int64_t rows, int64_t images, int64_t bins, uint8_t* codes,
                uint8_t* unordered) {
  std::vector<int64_t> edges;
  for (int64_t bin = 1; bin < bins; ++bin) edges.push_back(bin * images / bins);
#pragma omp parallel
  {
    std::vector<Key<Float>> keys(images), ordered(images), spare(images), thresholds(bins - 1);
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) {
      const Float* const own = values + row * images;
      unordered[row] = std::any_of(own, own + images, [](Float v) { return v != v; });
      if (unordered[row]) continue;
      std::transform(own, own + images, keys.begin(), key_of<Float>);
      ordered = keys;
      equal_mass_thresholds(ordered, spare, edges, thresholds);
      count_reached(keys, thresholds, codes + row * images);
    }
  }
}

template <typename Float>
void by_edges(const Float* values, const Float* edges, int64_t rows, int64_t images, int64_t bins,
              uint8_t* codes) {
#pragma omp parallel
  {
    std::vector<Key<Float>> keys(images), thresholds(bins - 1);
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) {
      const Float* const own = values + row * images;
      const Float* const edge = edges + row * (bins + 1);
      std::transform(own, own + images, keys.begin(), key_of<Float>);
      std::transform(edge + 1, edge + bins, thresholds.begin(), key_of<Float>);
      uint8_t* const out = codes + row * images;
      count_reached(keys, thresholds, out);
      for (int64_t n = 0; n < images; ++n) {
        if (!(own[n] >= edge[0] && own[n] <= edge[bins])) out[n] = 255;  // MISSING; also NaN
      }
    }
  }
}

}  // namespace
