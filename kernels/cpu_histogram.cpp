// Joint counts of bin codes and their mutual information on the CPU; kernels/reference.py says what
// each function computes, to the bit for counts.
//
// Codes are rows of bytes, one row a direction, `stride` bytes apart. Work is dealt to threads by
// pairs, and every pair is computed by one thread alone: results do not depend on their number.
// Counts stay in cache where only the information is asked for. -DPORTABLE leaves the vector
// instructions out.

#include "cpu_histogram_codes.h"
#include "cpu_histogram_lanes.h"
#include "cpu_histogram_pairs.h"

extern "C" {

void edge_codes_float(const float* values, const float* edges, int64_t rows, int64_t images,
                      int64_t bins, uint8_t* codes) {
  by_edges(values, edges, rows, images, bins, codes);
}

void edge_codes_double(const double* values, const double* edges, int64_t rows, int64_t images,
                       int64_t bins, uint8_t* codes) {
  by_edges(values, edges, rows, images, bins, codes);
}

void equal_mass_codes_float(const float* values, int64_t rows, int64_t images, int64_t bins,
                            uint8_t* codes, uint8_t* unordered) {
  equal_mass(values, rows, images, bins, codes, unordered);
}

void equal_mass_codes_double(const double* values, int64_t rows, int64_t images, int64_t bins,
                             uint8_t* codes, uint8_t* unordered) {
  equal_mass(values, rows, images, bins, codes, unordered);
}

// `groups` may be null: all images are in group 0. Images of no group are not counted.
void joint_histogram(const uint8_t* x, int64_t x_stride, const uint8_t* y, int64_t y_stride,
                     const int64_t* groups, int64_t pairs, int64_t total, int64_t start,
                     int64_t stop, int64_t bins, int64_t num_groups, const int64_t* rolls,
                     int64_t num_rolls, int32_t* out) {
  const Codes first{x, x_stride}, second{y, y_stride};
  const int64_t cells = bins * bins, size = cells + 1;
  const bool grouped = groups || num_groups > 1;
  std::vector<uint32_t> offsets(grouped ? stop - start + 1 : 0);  // + 1: never null if grouped
  for (int64_t n = start; n < (grouped ? stop : start); ++n) {
    const uint64_t group = groups ? groups[n] : 0;
    offsets[n - start] = std::min<uint64_t>(group, num_groups) * size;
  }
#pragma omp parallel
  {
    std::vector<uint32_t> tables = tables_of_a_pair(bins);
    if (grouped) tables.resize((num_groups + 1) * size);  // the last is for images of no group
#pragma omp for collapse(2)
    for (int64_t roll = 0; roll < num_rolls; ++roll) {
      for (int64_t pair = 0; pair < pairs; ++pair) {
        count_pair(first.row(pair), second.row(pair), {start, stop, total}, rolls[roll], bins,
                   grouped ? offsets.data() : nullptr, tables);
        for (int64_t group = 0; group < num_groups; ++group) {
          std::copy_n(tables.data() + group * size, cells,
                      out + ((roll * num_groups + group) * pairs + pair) * cells);
        }
      }
    }
  }
}

void matched_information(const uint8_t* x, int64_t x_stride, const uint8_t* y, int64_t y_stride,
                         int64_t pairs, int64_t images, int64_t bins, const int64_t* rolls,
                         int64_t num_rolls, double* out) {
  const Codes first{x, x_stride}, second{y, y_stride};
  const CLogC f(images);
#pragma omp parallel
  {
    std::vector<uint32_t> tables = tables_of_a_pair(bins);
#pragma omp for collapse(2)
    for (int64_t roll = 0; roll < num_rolls; ++roll) {
      for (int64_t pair = 0; pair < pairs; ++pair) {
        count_pair(first.row(pair), second.row(pair), {0, images, images}, rolls[roll], bins,
                   nullptr, tables);
        out[roll * pairs + pair] = information(tables.data(), bins, f);
      }
    }
  }
}

// One of `information` and `counts` is null.
void cross(const uint8_t* x, int64_t x_stride, int64_t x_rows, const uint8_t* y, int64_t y_stride,
           int64_t y_rows, int64_t images, int64_t bins, const int64_t* rolls, int64_t num_rolls,
           double* information, int32_t* counts) {
  const Cross job{{x, x_stride}, {y, y_stride}, x_rows,    y_rows,      images,
                  int(bins),     rolls,         num_rolls, information, counts};
#ifdef SHUFFLE
  if (bins <= MOST_BINS) return cross_by_lanes(job);
#endif
  cross_by_pairs(job);
}
}
