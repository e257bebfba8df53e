// Joint counts of one pair of rows of bin codes, any number of bins, and their mutual information.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int64_t BLOCK = 512;                // images whose cells are found before the counting
constexpr int64_t LEAST_LOGARITHMS = 32;      // of the table of f; cpu_histogram_lanes.h needs them
constexpr int64_t MOST_LOGARITHMS = 1 << 15;  // 256 KiB
constexpr int MOST_BINS_APART = 64;           // up to which four tables stay in cache

struct Codes {
  const uint8_t* data;
  int64_t stride;
  const uint8_t* row(int64_t index) const { return data + index * stride; }
};

struct Images {
  int64_t start, stop, total;
};

struct Cross {  // every x direction with every y direction at every roll
  Codes x, y;
  int64_t x_rows, y_rows, images;
  int bins;
  const int64_t* rolls;
  int64_t num_rolls;
  double* information;  // one of the two is asked for, the other is null
  int32_t* counts;

  // Where the result of x direction `i` and `partner` goes; a partner is a y direction and a roll.
  int64_t place(int64_t i, int64_t partner) const {
    return (partner / y_rows * x_rows + i) * y_rows + partner % y_rows;
  }
};

// f(c) = c log c.
struct CLogC {
  std::vector<double> table;

  explicit CLogC(int64_t largest)
      : table(std::clamp(largest + 1, LEAST_LOGARITHMS, MOST_LOGARITHMS)) {
    for (size_t c = 1; c < table.size(); ++c) table[c] = c * std::log(double(c));
  }
  double operator()(uint32_t c) const {
    return c < table.size() ? table[c] : c * std::log(double(c));
  }
};

// Image of the other side that is paired with `image`.
int64_t rolled(int64_t image, int64_t roll, int64_t total) {
  const int64_t at = (image - roll) % total;
  return at < 0 ? at + total : at;
}

// Cell of each image; one past the last for images that are not counted. (256 bins have none.)
void find_cells(const uint8_t* x, const uint8_t* y, int64_t count, int bins, uint16_t* cells) {
  for (int64_t i = 0; i < count; ++i) {
    const bool counted = (x[i] < bins) & (y[i] < bins);
    cells[i] = uint16_t(counted ? x[i] * bins + y[i] : bins * bins);
  }
}

std::vector<uint32_t> tables_of_a_pair(int bins) {
  const size_t size = bins * bins + 1;
  return std::vector<uint32_t>(bins <= MOST_BINS_APART ? 4 * size : size);
}

// Counts one pair into `tables`. `offsets`: where the table of each image's group begins, or null
// for tables_of_a_pair, whose first table holds the counts.
void count_pair(const uint8_t* x, const uint8_t* y, Images images, int64_t roll, int bins,
                const uint32_t* offsets, std::vector<uint32_t>& tables) {
  // Neighbors often fall in one cell: in different tables they need not wait for each other.
  const size_t size = bins * bins + 1, apart = !offsets && bins <= MOST_BINS_APART ? size : 0;
  uint32_t* const table = tables.data();
  uint16_t cells[BLOCK];
  std::fill(tables.begin(), tables.end(), 0);
  for (int64_t n = images.start, count; n < images.stop; n += count) {
    const int64_t at = rolled(n, roll, images.total);
    count = std::min({BLOCK, images.stop - n, images.total - at});
    find_cells(x + n, y + at, count, bins, cells);
    int64_t i = 0;
    if (offsets) {
      for (; i < count; ++i) ++table[offsets[n - images.start + i] + cells[i]];
    }
    for (; i + 4 <= count; i += 4) {
      ++table[cells[i]];
      ++table[apart + cells[i + 1]];
      ++table[2 * apart + cells[i + 2]];
      ++table[3 * apart + cells[i + 3]];
    }
    for (; i < count; ++i) ++table[cells[i]];
  }
  for (size_t c = 0; c < apart; ++c) {
    table[c] += table[apart + c] + table[2 * apart + c] + table[3 * apart + c];
  }
}

// Plug-in mutual information of a table, nats.
double information(const uint32_t* counts, int bins, const CLogC& f) {
  uint32_t columns[256] = {}, images = 0;
  double sums[4] = {};
  for (int i = 0; i < bins; ++i) {
    uint32_t row = 0;
    for (int j = 0; j < bins; ++j) {
      const uint32_t c = counts[i * bins + j];
      sums[j % 4] += f(c);
      columns[j] += c;
      row += c;
    }
    sums[0] -= f(row);
    images += row;
  }
  for (int j = 0; j < bins; ++j) sums[j % 4] -= f(columns[j]);
  const double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return images ? (f(images) + sum) / images : 0;
}

void cross_by_pairs(const Cross& job) {
  const CLogC f(job.images);
  const int64_t cells = job.bins * job.bins;
#pragma omp parallel
  {
    std::vector<uint32_t> tables = tables_of_a_pair(job.bins);
#pragma omp for collapse(2)
    for (int64_t i = 0; i < job.x_rows; ++i) {
      for (int64_t partner = 0; partner < job.num_rolls * job.y_rows; ++partner) {
        const int64_t roll = job.rolls[partner / job.y_rows], place = job.place(i, partner);
        count_pair(job.x.row(i), job.y.row(partner % job.y_rows), {0, job.images, job.images},
                   roll, job.bins, nullptr, tables);
        if (job.information) job.information[place] = information(tables.data(), job.bins, f);
        if (job.counts) std::copy_n(tables.data(), cells, job.counts + place * cells);
      }
    }
  }
}

}  // namespace
