// All pairs of many rows of bin codes, up to 16 bins, with byte shuffles: AVX-512 or AVX2.
//
// The lanes of a register are x directions, which share the images of one bin of y. A byte shuffle
// is a table of 16 entries: looked up with a code, table k gives 1 for bin 2 k and 16 for bin
// 2 k + 1, so that a byte holds two counters of 4 bits. They are full after 15 images and are added
// to counters of 8 bits, those after 255 images to counters of 32 bits.

#pragma once

#include "cpu_histogram_pairs.h"

#if !defined(PORTABLE) && (defined(__AVX512BW__) || defined(__AVX2__))
#define SHUFFLE
#include <immintrin.h>

namespace {

#ifdef __AVX512BW__
constexpr int LANES = 64;
#else
constexpr int LANES = 32;
#endif
constexpr int MOST_BINS = 16;
constexpr int64_t TILE = 4096;    // images of a tile, which fills half of the cache or less
constexpr int64_t TOGETHER = 4;   // partners counted per tile where the images need several tiles
constexpr int64_t PARTNERS = 16;  // of one task; a multiple of TOGETHER

constexpr int PART = LANES / sizeof(double);  // lanes whose sums are one register

typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint32_t PartCounts __attribute__((vector_size(LANES / 2)));
typedef uint64_t PartIndices __attribute__((vector_size(LANES)));
typedef double PartSums __attribute__((vector_size(LANES)));

struct alignas(LANES) Row {  // codes of one image along LANES directions
  uint8_t lane[LANES];
};

struct Counts {
  uint32_t cell[MOST_BINS][MOST_BINS][LANES];  // [bin of y][bin of x][lane]
};

struct Scratch {
  std::vector<Row> tile;
  std::vector<Counts> counts;
  std::vector<uint16_t> order;  // images of a tile, those of bin 0 of y first
  int64_t ends[MOST_BINS];      // where each bin ends in `order`
};

inline Bytes look_up(Bytes table, Bytes codes) {
#ifdef __AVX512BW__
  return (Bytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)codes);
#else
  return (Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)codes);
#endif
}

// Swaps rows and columns: each round rotates the 8 bits of (row, column) by one.
void transpose(__m128i rows[16]) {
  for (int round = 0; round < 4; ++round) {
    __m128i mixed[16];
    for (int i = 0; i < 8; ++i) {
      mixed[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
      mixed[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
    }
    std::copy(mixed, mixed + 16, rows);
  }
}

// Images `start` to `start + count` along `lanes` directions. Codes that are not counted become
// 255, for which a shuffle gives 0.
void fill_tile(Codes x, int64_t lanes, int64_t start, int64_t count, int bins, Row* tile) {
  for (int64_t lane = 0; lane < lanes; lane += 16) {
    const int64_t height = std::min<int64_t>(16, lanes - lane);
    for (int64_t n = 0; n < count; n += 16) {
      const int64_t width = std::min<int64_t>(16, count - n);
      __m128i part[16] = {};
      for (int64_t i = 0; i < height; ++i) {
        std::memcpy(&part[i], x.row(lane + i) + start + n, width);
      }
      transpose(part);
      for (int64_t i = 0; i < width; ++i) std::memcpy(tile[n + i].lane + lane, &part[i], 16);
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    for (uint8_t& code : tile[n].lane) code = code < bins ? code : 255;
  }
}

// Fills `order` and `ends` from the codes of one partner.
void sort_by_bin(const uint8_t* y, Images images, int64_t roll, int bins, Scratch& scratch) {
  uint8_t codes[TILE];
  int64_t next[MOST_BINS + 1] = {};  // the last is for what is not counted
  const int64_t count = images.stop - images.start;
  for (int64_t n = 0, length; n < count; n += length) {
    const int64_t at = rolled(images.start + n, roll, images.total);
    length = std::min(count - n, images.total - at);
    for (int64_t i = 0; i < length; ++i) codes[n + i] = std::min<uint8_t>(y[at + i], bins);
  }
  for (int64_t n = 0; n < count; ++n) ++next[codes[n]];
  int64_t end = 0;
  for (int bin = 0; bin <= bins; ++bin) end += std::exchange(next[bin], end);
  for (int64_t n = 0; n < count; ++n) scratch.order[next[codes[n]]++] = n;
  std::copy_n(next, bins, scratch.ends);
}

// Adds the bins of x of some images, in PAIRS of bins.
template <int PAIRS>
void count_rows(const Row* tile, const uint16_t* order, int64_t images, uint32_t (*counts)[LANES]) {
  Bytes table[PAIRS] = {}, row;
  for (int bin = 0; bin < 2 * PAIRS; ++bin) {
    for (int lane = bin; lane < LANES; lane += 16) table[bin / 2][lane] = bin % 2 ? 16 : 1;
  }
  for (int64_t done = 0; done < images;) {
    Bytes sums[2 * PAIRS] = {};
    for (const int64_t full = std::min(images, done + 255); done < full;) {
      Bytes nibbles[PAIRS] = {};
      for (const int64_t stop = std::min(full, done + 15); done < stop; ++done) {
        std::memcpy(&row, &tile[order[done]], sizeof row);
        for (int k = 0; k < PAIRS; ++k) nibbles[k] += look_up(table[k], row);
      }
      for (int k = 0; k < PAIRS; ++k) {
        sums[2 * k] += nibbles[k] & 15;
        sums[2 * k + 1] += nibbles[k] >> 4;
      }
    }
    for (int bin = 0; bin < 2 * PAIRS; ++bin) {
      for (int lane = 0; lane < LANES; ++lane) counts[bin][lane] += sums[bin][lane];
    }
  }
}

void count_tile(const Scratch& scratch, int bins, Counts& counts) {
  for (int64_t bin = 0, begin = 0; bin < bins; begin = scratch.ends[bin++]) {
    const auto count = bins <= 4    ? count_rows<2>
                       : bins <= 8  ? count_rows<4>
                       : bins <= 12 ? count_rows<6>
                                    : count_rows<8>;
    count(scratch.tile.data(), scratch.order.data() + begin, scratch.ends[bin] - begin,
          counts.cell[bin]);
  }
}

// f(c) = c log c of PART counts, none of them beyond the table.
#ifdef __AVX512BW__
struct Known {
  const double* table;

  // Most counts are small: the first 32 entries are looked up in registers.
  PartSums operator()(PartCounts counts) const {
    const __m512i index = (__m512i)__builtin_convertvector(counts, PartIndices);
    const __m512d low = _mm512_permutex2var_pd(eight(0), index, eight(8));
    const __m512d high = _mm512_permutex2var_pd(eight(16), index, eight(24));
    const __mmask8 is_high = _mm512_test_epi64_mask(index, _mm512_set1_epi64(16));
    const __mmask8 beyond = _mm512_cmpgt_epu64_mask(index, _mm512_set1_epi64(31));
    const __m512d found = _mm512_mask_mov_pd(low, is_high, high);
    if (!beyond) return (PartSums)found;
    return (PartSums)_mm512_mask_i32gather_pd(found, beyond, (__m256i)counts, table, 8);
  }
  __m512d eight(int first) const { return _mm512_loadu_pd(table + first); }
};
#else
struct Known {
  const double* table;

  PartSums operator()(PartCounts counts) const {
    PartSums found;
    for (int lane = 0; lane < PART; ++lane) found[lane] = table[counts[lane]];
    return found;
  }
};
#endif

// The same of any counts.
struct Any {
  const CLogC& f;

  PartSums operator()(PartCounts counts) const {
    PartSums found;
    for (int lane = 0; lane < PART; ++lane) found[lane] = f(counts[lane]);
    return found;
  }
};

// Plug-in mutual information in every lane, nats.
template <typename Function>
void lane_information(const Counts& counts, int bins, const Function& f, double* out) {
  for (int part = 0; part < LANES; part += PART) {
    PartCounts rows[MOST_BINS] = {}, images = {}, cell;
    PartSums sums = {};
    for (int j = 0; j < bins; ++j) {
      PartCounts column = {};
      for (int i = 0; i < bins; ++i) {
        std::memcpy(&cell, counts.cell[j][i] + part, sizeof cell);
        sums += f(cell);
        column += cell;
        rows[i] += cell;
      }
      sums -= f(column);
      images += column;
    }
    for (int i = 0; i < bins; ++i) sums -= f(rows[i]);
    sums += f(images);
    for (int l = 0; l < PART; ++l) out[part + l] = images[l] ? sums[l] / images[l] : 0;
  }
}

// Stores the results of x directions `first` to `first + lanes` with one partner.
void store(const Cross& job, const Counts& counts, const CLogC& f, int64_t first, int64_t lanes,
           int64_t partner) {
  if (job.information) {
    double found[LANES];
    if (job.images < MOST_LOGARITHMS) {
      lane_information(counts, job.bins, Known{f.table.data()}, found);
    } else {
      lane_information(counts, job.bins, Any{f}, found);
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      job.information[job.place(first + lane, partner)] = found[lane];
    }
    return;
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    int32_t* out = job.counts + job.place(first + lane, partner) * job.bins * job.bins;
    for (int i = 0; i < job.bins; ++i) {
      for (int j = 0; j < job.bins; ++j) *out++ = counts.cell[j][i][lane];
    }
  }
}

// One task: LANES x directions from `first` on with partners `begin` to `end`.
void cross_task(const Cross& job, const CLogC& f, int64_t first, int64_t begin, int64_t end,
                Scratch& scratch) {
  const int64_t lanes = std::min<int64_t>(LANES, job.x_rows - first);
  const int64_t together = scratch.counts.size();
  for (int64_t from = begin; from < end; from += together) {
    const int64_t to = std::min(end, from + together);
    std::memset(scratch.counts.data(), 0, together * sizeof(Counts));
    for (int64_t start = 0; start < job.images; start += TILE) {
      const int64_t stop = std::min(job.images, start + TILE);
      if (from == begin || job.images > TILE) {
        const Codes x{job.x.row(first), job.x.stride};
        fill_tile(x, lanes, start, stop - start, job.bins, scratch.tile.data());
      }
      for (int64_t partner = from; partner < to; ++partner) {
        sort_by_bin(job.y.row(partner % job.y_rows), {start, stop, job.images},
                    job.rolls[partner / job.y_rows], job.bins, scratch);
        count_tile(scratch, job.bins, scratch.counts[partner - from]);
      }
    }
    for (int64_t partner = from; partner < to; ++partner) {
      store(job, scratch.counts[partner - from], f, first, lanes, partner);
    }
  }
}

void cross_by_lanes(const Cross& job) {
  const CLogC f(job.images);
  const int64_t partners = job.num_rolls * job.y_rows;
#pragma omp parallel
  {
    Scratch scratch{std::vector<Row>(std::min(job.images, TILE)),
                    std::vector<Counts>(job.images > TILE ? TOGETHER : 1),
                    std::vector<uint16_t>(TILE),
                    {}};
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t first = 0; first < job.x_rows; first += LANES) {
      for (int64_t begin = 0; begin < partners; begin += PARTNERS) {
        cross_task(job, f, first, begin, std::min(partners, begin + PARTNERS), scratch);
      }
    }
  }
}

}  // namespace
#endif
