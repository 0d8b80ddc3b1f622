// The softmax of one row of logits by two passes over the row: its sums, then its gradient.
//
// With c = log2(e) / temperature and y_j = (x_j - shift) c, probabilities are p_j = 2^y_j / (sum of 2^y). The shift is
// the maximum. It is subtracted before the scaling, so that a row far from 0 loses no digits.
#pragma once
#include "cpu/lanes.h"

namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr int64_t kUnroll = 4;  // independent sums hide the latency of the additions
constexpr int64_t kStep = kUnroll * kLanes;
constexpr int64_t kTile = 16 * kStep;  // read twice, by tile_max and tile_sums: it must fit in the first-level cache

struct RowSums {
  float shift;     // -inf where every logit is -inf
  float sum;       // sum of 2^y
  float weighted;  // sum of 2^y y
};

// A sink receives the 2^y while they are summed. One sink forgets them. The other keeps them, so that the gradient
// needs no second exponential.
struct ForgetExponentials {
  void put(int64_t, Floats) {}
  void put_part(int64_t, Floats, int64_t) {}
  void end_tile(int64_t, float) {}
};
struct KeepExponentials {
  float* values;       // [n], each tile relative to its own shift; may be the row itself
  float* tile_shifts;  // [tiles_of(n)]
  void put(int64_t j, Floats e) { store(values + j, e); }
  void put_part(int64_t j, Floats e, int64_t length) { store_part(values + j, e, length); }
  void end_tile(int64_t j, float shift) { tile_shifts[j / kTile] = shift; }
};
MINIRL_INLINE int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

// Sums of a tile, or of all tiles so far. Adding whole tiles keeps the rounding error of a long row small.
struct PartialSums {
  Floats sum[kUnroll], weighted[kUnroll];
};

MINIRL_INLINE Floats accumulate(PartialSums& tile, int64_t u, Floats x, Floats shift, Floats c) {
  Floats y = bounded_exponent((x - shift) * c);
  Floats e = exp2_lanes(y);
  tile.sum[u] = tile.sum[u] + e;
  tile.weighted[u] = tile.weighted[u] + e * y;
  return e;
}

// The sums over x[begin .. end).
template <class T, class Sink>
MINIRL_INLINE PartialSums tile_sums(const T* x, int64_t begin, int64_t end, float shift, float c, Sink& sink) {
  const Floats shifts = splat(shift), cs = splat(c);
  PartialSums tile;
  for (int64_t u = 0; u < kUnroll; ++u) tile.sum[u] = tile.weighted[u] = splat(0.f);
  int64_t j = begin, u = 0;
  for (; j + kStep <= end; j += kStep)
    for (int64_t v = 0; v < kUnroll; ++v)
      sink.put(j + v * kLanes, accumulate(tile, v, load(x + j + v * kLanes), shifts, cs));
  for (; j + kLanes <= end; ++u, j += kLanes) sink.put(j, accumulate(tile, u, load(x + j), shifts, cs));
  if (j < end) sink.put_part(j, accumulate(tile, u, load_part(x + j, end - j), shifts, cs), end - j);
  sink.end_tile(begin, shift);
  return tile;
}

MINIRL_INLINE Floats join(const Floats (&v)[kUnroll]) { return (v[0] + v[1]) + (v[2] + v[3]); }

// The largest of x[0 .. n).
template <class T>
MINIRL_INLINE float tile_max(const T* x, int64_t n) {
  Floats m[kUnroll];
  for (int64_t u = 0; u < kUnroll; ++u) m[u] = splat(-INFINITY);
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep)
    for (int64_t u = 0; u < kUnroll; ++u) m[u] = max(m[u], load(x + j + u * kLanes));
  for (; j < n; j += kLanes) m[0] = max(m[0], load_first(x + j, n - j));
  return max_lanes(max(max(m[0], m[1]), max(m[2], m[3])));
}

// Adjusts the sums to a larger shift, which lowers every y so far by the same amount.
MINIRL_INLINE void move_shift(PartialSums& row, float from, float to, float c) {
  const float fall = (from - to) * c;
  // the bound, because `from` is -inf before the first finite logit, and 0 * -inf would be NaN
  const Floats factor = splat(exp2_one(fall)), falls = splat(fall > -127.f ? fall : -127.f);
  for (int64_t u = 0; u < kUnroll; ++u) {
    row.weighted[u] = (row.weighted[u] + row.sum[u] * falls) * factor;
    row.sum[u] = row.sum[u] * factor;
  }
}

// The sums over x[0 .. n), tile by tile. The shift is the maximum so far.
template <class T, class Sink>
MINIRL_INLINE RowSums row_sums(const T* x, int64_t n, float c, Sink& sink) {
  PartialSums row;
  for (int64_t u = 0; u < kUnroll; ++u) row.sum[u] = row.weighted[u] = splat(0.f);
  float shift = -INFINITY;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t end = n - begin < kTile ? n : begin + kTile;
    const float maximum = tile_max(x + begin, end - begin);
    if (maximum > shift) {
      move_shift(row, shift, maximum, c);
      shift = maximum;
    }
    // while all logits so far are -inf, any finite shift makes the tile add nothing
    const PartialSums tile = tile_sums(x, begin, end, shift == -INFINITY ? 0.f : shift, c, sink);
    for (int64_t u = 0; u < kUnroll; ++u) {
      row.sum[u] = row.sum[u] + tile.sum[u];
      row.weighted[u] = row.weighted[u] + tile.weighted[u];
    }
  }
  return {shift, sum_lanes(join(row.sum)), sum_lanes(join(row.weighted))};
}

// The slope of a softcap, d x / d u with x = softcap tanh(u / softcap): 1 - (x / softcap)^2, or 1 without a softcap.
// With a softcap it is 0 where x is -inf, for a token that was not kept.
struct NoSoftcap {
  Floats slope(Floats) const { return splat(1.f); }
  float slope_one(float) const { return 1.f; }
};
struct Softcap {
  float reciprocal;  // 1 / softcap
  Floats slope(Floats x) const {
    const Floats t = x * splat(reciprocal);
    return max(splat(0.f), splat(1.f) - t * t);
  }
  float slope_one(float x) const { return slope(splat(x)).part[0][0]; }
};

// out_j = 2^y_j (k0 + k1 y_j), times the slope of a softcap; `out` may be `x`.
template <bool kWithEntropy, class T, class U, class Cap>
MINIRL_INLINE void write_gradient(const T* x, U* out, int64_t n, float c, float shift, float k0, float k1, Cap cap) {
  const Floats shifts = splat(shift), cs = splat(c), k0s = splat(k0), k1s = splat(k1);
  auto gradient = [&](Floats v) __attribute__((always_inline)) {
    Floats y = bounded_exponent((v - shifts) * cs);
    Floats e = exp2_lanes(y);
    return (kWithEntropy ? e * (k0s + k1s * y) : e * k0s) * cap.slope(v);
  };
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep)
    for (int64_t u = 0; u < kUnroll; ++u) store(out + j + u * kLanes, gradient(load(x + j + u * kLanes)));
  for (; j + kLanes <= n; j += kLanes) store(out + j, gradient(load(x + j)));
  if (j < n) store_part(out + j, gradient(load_part(x + j, n - j)), n - j);
}

// write_gradient with k1 = 0, from kept exponentials, which may lie in `out` itself.
template <class U>
MINIRL_INLINE void write_kept_gradient(const KeepExponentials& kept, U* out, int64_t n, float c, float shift,
                                       float k0) {
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t end = n - begin < kTile ? n : begin + kTile;
    const Floats k = splat(k0 * exp2_one((kept.tile_shifts[begin / kTile] - shift) * c));
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) store(out + j, load(kept.values + j) * k);
    if (j < end) store_part(out + j, load_part(kept.values + j, end - j) * k, end - j);
  }
}

// The results of a row for its token, in nats.
struct TokenStats {
  float log_prob, entropy, log_sum;  // log p_j = (x_j - shift) / temperature - log_sum
};

MINIRL_INLINE TokenStats token_stats(RowSums sums, float logit, float temperature) {
  const double log_sum = log((double)sums.sum);
  return {(float)(((double)logit - sums.shift) / temperature - log_sum),
          (float)(log_sum - (double)kLn2 * sums.weighted / sums.sum), (float)log_sum};
}

// d loss / d logits of a row, from c_t = d loss / d log p(id) and e_t = d loss / d entropy:
// (c_t (onehot - p) - e_t p (log p + entropy)) / temperature = 2^y (k0 + k1 y), plus c_t / temperature at id.
struct RowGradient {
  float k0, k1, at_id;  // at_id: the whole gradient at id
};

MINIRL_INLINE RowGradient row_gradient(TokenStats stats, float shift, float logit, float temperature,
                                       float log_prob_grad, float entropy_grad) {
  const float c = kLog2E / temperature, scale = (float)exp(-(double)stats.log_sum) / temperature;
  const float k0 = -(log_prob_grad + entropy_grad * (stats.entropy - stats.log_sum)) * scale;
  const float k1 = -entropy_grad * kLn2 * scale;
  // the bound of bounded_exponent: for a logit of -inf, 0 * -inf would be NaN
  const float y = (logit - shift) * c, bounded = y < -127.f ? -127.f : y;
  return {k0, k1, exp2_one(bounded) * (k0 + k1 * bounded) + log_prob_grad / temperature};
}

// Writes d loss / d logits of a row. `out` may be `x`. An id of kElsewhere is in another shard of the vocabulary.
template <class T, class U, class Cap>
MINIRL_INLINE void write_row(const T* x, U* out, int64_t n, int64_t id, float temperature, float shift,
                             TokenStats stats, float log_prob_grad, float entropy_grad, Cap cap) {
  if (log_prob_grad == 0.f && entropy_grad == 0.f) {
    memset((void*)out, 0, n * sizeof(U));
    return;
  }
  const float c = kLog2E / temperature, logit = id < 0 ? 0.f : load_one(x + id);
  const RowGradient g = row_gradient(stats, shift, logit, temperature, log_prob_grad, entropy_grad);
  if (g.k1 == 0.f)
    write_gradient<false>(x, out, n, c, shift, g.k0, 0.f, cap);
  else
    write_gradient<true>(x, out, n, c, shift, g.k0, g.k1, cap);
  if (id >= 0) store_one(out + id, g.at_id * cap.slope_one(logit));
}

// write_row with a softcap, or without one where it is 0.
template <class T, class U>
MINIRL_INLINE void write_row(const T* x, U* out, int64_t n, int64_t id, float temperature, float shift,
                             TokenStats stats, float log_prob_grad, float entropy_grad, float softcap) {
  if (softcap == 0.f)
    write_row(x, out, n, id, temperature, shift, stats, log_prob_grad, entropy_grad, NoSoftcap{});
  else
    write_row(x, out, n, id, temperature, shift, stats, log_prob_grad, entropy_grad, Softcap{1.f / softcap});
}

// write_row without entropy_grad and softcap, from kept exponentials. `logit` is the logit of id, which an exponential
// may have overwritten.
template <class U>
MINIRL_INLINE void write_kept_row(const KeepExponentials& kept, U* out, int64_t n, int64_t id, float temperature,
                                  float shift, TokenStats stats, float logit, float log_prob_grad) {
  if (log_prob_grad == 0.f) {
    memset((void*)out, 0, n * sizeof(U));
    return;
  }
  const RowGradient g = row_gradient(stats, shift, logit, temperature, log_prob_grad, 0.f);
  write_kept_gradient(kept, out, n, kLog2E / temperature, shift, g.k0);
  store_one(out + id, g.at_id);
}

}  // namespace
