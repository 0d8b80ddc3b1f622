// Sums whose order depends on the number of terms alone, not on how the terms lie.
//
// Terms are cut into blocks of kSumBlock. In a block, term j is added to partial sum j % kPartials, and the partial
// sums are added by halves. The sums of the blocks are added one after another in double precision. The partial sums of
// a row are the lanes of four vectors; those of columns are one vector each. So a row and a column of equal terms have
// equal bits.
#pragma once
#include "cpu/lanes.h"
#include "cpu/sum_blocks.h"

namespace {

using minirl::kStrip;
using minirl::kSumBlock;

constexpr int64_t kPartials = 4 * kLanes;
constexpr int64_t kStripVectors = kStrip / kLanes;  // their partial sums stay in the first-level cache

MINIRL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `n` lanes, at most all; the others are 0.
template <class T>
MINIRL_INLINE Floats load_or_zero(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T padded[kLanes] = {};
  memcpy((void*)padded, p, n * sizeof(T));
  return load(padded);
}

// The sum of one block of `n` terms. term(j, lanes) gives sixteen terms from j on, 0 beyond the first `lanes`.
template <class Term>
MINIRL_INLINE float block_sum(int64_t n, const Term& term) {
  Floats sums[4] = {splat(0.f), splat(0.f), splat(0.f), splat(0.f)};
  int64_t j = 0;
  for (; j + kPartials <= n; j += kPartials)
    for (int64_t u = 0; u < 4; ++u) sums[u] = sums[u] + term(j + u * kLanes, kLanes);
  for (int64_t u = 0; j < n; ++u, j += kLanes) sums[u] = sums[u] + term(j, smaller(n - j, kLanes));
  return sum_lanes((sums[0] + sums[2]) + (sums[1] + sums[3]));
}

// The sum of any number of terms.
template <class Term>
MINIRL_INLINE double row_sum(int64_t n, const Term& term) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock)
    total += block_sum(smaller(n - begin, kSumBlock),
                       [&](int64_t j, int64_t lanes) __attribute__((always_inline)) { return term(begin + j, lanes); });
  return total;
}

using ColumnSums = Floats[kPartials][kStripVectors];

template <class Term>
MINIRL_INLINE void add_rows(ColumnSums& sums, int64_t n, int64_t width, const Term& term) {
  const int64_t vectors = (width + kLanes - 1) / kLanes, first = smaller(n, kPartials);
  for (int64_t row = 0; row < first; ++row)
    for (int64_t v = 0; v < vectors; ++v) sums[row][v] = splat(0.f) + term(row, v * kLanes, width - v * kLanes);
  for (int64_t row = first; row < n; ++row)
    for (int64_t v = 0; v < vectors; ++v) {
      Floats& sum = sums[row % kPartials][v];
      sum = sum + term(row, v * kLanes, width - v * kLanes);
    }
}

// The sums over one block of `n` rows, for at most kStrip columns: put(column, sums, lanes) takes sixteen columns at
// once. term(row, column, lanes) gives sixteen terms of a row; terms beyond the first `lanes` are ignored.
template <class Term, class Put>
MINIRL_INLINE void column_sums(int64_t n, int64_t width, const Term& term, const Put& put) {
  ColumnSums sums;
  if (width == kStrip)
    add_rows(sums, n, kStrip, term);
  else
    add_rows(sums, n, width, term);
  const int64_t vectors = (width + kLanes - 1) / kLanes;
  // partial sums of no row are left out: they would add 0
  for (int64_t half = kPartials / 2, used = smaller(n, kPartials); half; used = smaller(used, half), half /= 2)
    for (int64_t i = 0; i + half < used; ++i)
      for (int64_t v = 0; v < vectors; ++v) sums[i][v] = sums[i][v] + sums[i + half][v];
  for (int64_t v = 0; v < vectors; ++v) put(v * kLanes, n ? sums[0][v] : splat(0.f), width - v * kLanes);
}

}  // namespace
