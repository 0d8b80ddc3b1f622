// The experts of each row of router logits, natural or replayed, their weights, and the gradients of the logits.
//
// A score is kept up to a factor: t_j = e^(x_j - shift), or e^(min(x_j, 0) - shift) / (1 + e^-|x_j|). The shift makes
// the largest score about 1, so that numerator and denominator of a ratio never both underflow.
#include "cpu/moe_routing.h"

#include "cpu/lanes.h"

namespace minirl {
namespace {

// min(x, 0); NaN stays.
MINIRL_INLINE Floats negative_part(Floats x) { return splat(0.f) - max(splat(0.f), splat(0.f) - x); }
// 1 + e^-|x|
MINIRL_INLINE Floats sigmoid_denominator(Floats x) {
  Ints sign_set = bits_of(x);
  MINIRL_EACH_PART sign_set.part[i] |= 0x80000000;
  return splat(1.f) + exp_lanes(floats_of(sign_set));
}

// Rows are copied to memory of whole vectors, with -inf after the last logit.
MINIRL_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class T>
MINIRL_INLINE void load_row(const T* p, int64_t n, float* x) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(x + j, load(p + j));
  if (j < n) store(x + j, load_part(p + j, n - j));
}

MINIRL_INLINE float shift_of(const float* x, int64_t n, bool sigmoid) {
  Floats m = splat(-INFINITY);
  for (int64_t j = 0; j < n; j += kLanes) m = max(m, load(x + j));
  const float largest = max_lanes(m);
  return sigmoid && largest > 0.f ? 0.f : largest;
}

// Writes the scores to t; returns their sum.
MINIRL_INLINE float fill_scores(const float* x, int64_t n, bool sigmoid, float shift, float* t) {
  const Floats shifts = splat(shift);
  Floats sum = splat(0.f);
  for (int64_t j = 0; j < n; j += kLanes) {
    const Floats v = load(x + j);
    const Floats score =
        sigmoid ? exp_lanes(negative_part(v) - shifts) / sigmoid_denominator(v) : exp_lanes(v - shifts);
    store(t + j, score);
    sum = sum + score;
  }
  return sum_lanes(sum);
}

// Integers in the order of the floats: -0 equals 0, and NaN is above all numbers.
MINIRL_INLINE void fill_keys(const float* x, int64_t n, int32_t* keys) {
  for (int64_t j = 0; j < n; ++j) {
    const float v = x[j] + 0.f;
    int32_t bits;
    memcpy(&bits, &v, sizeof bits);
    bits ^= (bits >> 31) & 0x7fffffff;
    keys[j] = v == v ? bits : 0x7fffffff;
  }
}

// The k largest keys in descending order; of equal keys the lower place comes first.
struct Ranking {
  int32_t keys[kMaxExperts + 1], places[kMaxExperts + 1];
};
MINIRL_INLINE void rank(const int32_t* keys, int64_t n, int64_t k, Ranking& out) {
  for (int64_t j = 0; j < n; ++j) {
    const int32_t key = keys[j];
    if (j >= k && key <= out.keys[k - 1]) continue;
    int64_t place = j < k ? j : k - 1;
    for (; place > 0 && out.keys[place - 1] < key; --place) {
      out.keys[place] = out.keys[place - 1];
      out.places[place] = out.places[place - 1];
    }
    out.keys[place] = key;
    out.places[place] = (int32_t)j;
  }
}

struct Scratch {
  float x[kMaxExperts], t[kMaxExperts], plain[kMaxExperts], selection[kMaxExperts], gathered[kMaxExperts];
  int32_t keys[kMaxExperts];
  Ranking ranking;
  int64_t chosen[kMaxExperts];
  uint64_t is_natural[kMaxExperts / 64], is_chosen[kMaxExperts / 64];
};

MINIRL_INLINE bool has(const uint64_t* set, int64_t j) { return set[j / 64] >> (j % 64) & 1; }
MINIRL_INLINE void add(uint64_t* set, int64_t j) { set[j / 64] |= (uint64_t)1 << (j % 64); }

// Gives experts outside the chosen groups a key below that of any score.
MINIRL_INLINE void keep_best_groups(const MoERouting& args, Scratch& s) {
  const int64_t size = args.logits.rows.size / args.num_groups;
  for (int64_t group = 0; group < args.num_groups; ++group) {
    rank(s.keys + group * size, size, 2, s.ranking);
    const float* scores = s.selection + group * size;
    s.gathered[group] = scores[s.ranking.places[0]] + scores[s.ranking.places[1]];
  }
  int32_t* const group_keys = (int32_t*)s.chosen;
  fill_keys(s.gathered, args.num_groups, group_keys);
  rank(group_keys, args.num_groups, args.top_k_groups, s.ranking);
  memset(s.is_chosen, 0, sizeof s.is_chosen);
  for (int64_t i = 0; i < args.top_k_groups; ++i) add(s.is_chosen, s.ranking.places[i]);
  for (int64_t group = 0; group < args.num_groups; ++group)
    if (!has(s.is_chosen, group))
      for (int64_t j = 0; j < size; ++j) s.keys[group * size + j] = INT32_MIN;
}

// Writes the row's replayed experts to s.chosen; false if one is out of range or repeated.
MINIRL_INLINE bool read_replayed(const MoERouting& args, int64_t row, Scratch& s) {
  memset(s.is_chosen, 0, sizeof s.is_chosen);
  for (int64_t i = 0; i < args.logits.top_k; ++i) {
    const int64_t id = integer_at(args.routed, args.routed_dtype, row * args.routed_stride + i);
    if (id < 0 || id >= args.logits.rows.size || has(s.is_chosen, id)) return false;
    add(s.is_chosen, id);
    s.chosen[i] = id;
  }
  return true;
}

template <class T>
MINIRL_INLINE void route_row(const T* type, const MoERouting& args, int64_t row, Scratch& s) {
  const RouterLogits& logits = args.logits;
  const int64_t n = logits.rows.size, k = logits.top_k;
  load_row(row_of(type, logits.rows, row), n, s.x);
  const float shift = shift_of(s.x, n, logits.sigmoid);
  const float total = fill_scores(s.x, n, logits.sigmoid, shift, s.t);
  const bool by_score = args.bias || args.num_groups > 1;
  const float* plain = s.t;  // the scores without the factor, where they are needed
  if ((by_score || !logits.normalize) && !(logits.sigmoid && shift == 0.f)) {
    plain = s.plain;
    if (logits.sigmoid)
      fill_scores(s.x, n, true, 0.f, s.plain);
    else
      for (int64_t j = 0; j < n; j += kLanes) store(s.plain + j, load(s.t + j) / splat(total));
  }

  const float* selection = s.x;
  if (by_score) {
    for (int64_t j = 0; j < n; ++j) s.selection[j] = args.bias ? plain[j] + args.bias[j] : plain[j];
    selection = s.selection;
  }
  fill_keys(selection, n, s.keys);
  if (args.num_groups > 1) keep_best_groups(args, s);
  const int64_t candidates = n / args.num_groups * args.top_k_groups;
  rank(s.keys, n, k < candidates ? k + 1 : k, s.ranking);
  float margin = INFINITY;
  if (k < candidates) {
    const float kth = selection[s.ranking.places[k - 1]], next = selection[s.ranking.places[k]];
    margin = kth == next ? 0.f : kth - next;  // also where both are infinite
  }

  float agreement = 1.f;
  if (args.routed && (!args.valid || args.valid[row])) {
    if (!read_replayed(args, row, s)) {
      args.agreement[row] = NAN;
      return;
    }
    memset(s.is_natural, 0, sizeof s.is_natural);
    for (int64_t i = 0; i < k; ++i) add(s.is_natural, s.ranking.places[i]);
    int64_t shared = 0;
    for (int64_t i = 0; i < k; ++i) shared += has(s.is_natural, s.chosen[i]);
    agreement = (float)shared / (float)k;
  } else {
    for (int64_t i = 0; i < k; ++i) s.chosen[i] = s.ranking.places[i];
  }

  float* const weights = args.weights + row * k;
  if (logits.normalize) {
    for (int64_t i = 0; i < padded(k); ++i) s.gathered[i] = i < k ? s.x[s.chosen[i]] : -INFINITY;
    const float sum = fill_scores(s.gathered, k, logits.sigmoid, shift_of(s.gathered, k, logits.sigmoid), s.gathered);
    for (int64_t i = 0; i < k; ++i) weights[i] = s.gathered[i] / sum * logits.scale;
  } else {
    for (int64_t i = 0; i < k; ++i) weights[i] = plain[s.chosen[i]] * logits.scale;
  }
  for (int64_t i = 0; i < k && total != total; ++i) weights[i] = NAN;  // a NaN anywhere in the row
  float mass = 0.f;
  for (int64_t i = 0; i < k; ++i) {
    mass += s.t[s.chosen[i]];
    args.experts[row * k + i] = s.chosen[i];
    if (args.natural) args.natural[row * k + i] = s.ranking.places[i];
  }
  args.agreement[row] = agreement;
  args.mass[row] = mass / total;
  args.margin[row] = margin;
}

// For a softmax, d w_i / d x_j = w_i (1[i = j] - p_j), where p is weights / scale if normalised, else the softmax.
// For a sigmoid, normalised weights have 1 - s_j times that derivative; others have w_i (1 - s_i) 1[i = j].
template <class T>
MINIRL_INLINE void backward_row(const T* type, const MoERoutingBackward& args, int64_t row, float* x) {
  const RouterLogits& logits = args.logits;
  const int64_t n = logits.rows.size, k = logits.top_k;
  const T* const p = row_of(type, logits.rows, row);
  T* const out = (T*)args.out + row * n;
  const int64_t* const experts = args.experts + row * k;
  const float *const weights = args.weights + row * k, *const grads = args.weight_grad + row * k;
  float dot = 0.f;
  for (int64_t i = 0; i < k; ++i) dot += weights[i] * grads[i];
  if (logits.normalize || logits.sigmoid) {
    memset((void*)out, 0, n * sizeof(T));
    const float mean = logits.normalize ? dot / logits.scale : 0.f;
    for (int64_t i = 0; i < k; ++i) {
      float grad = weights[i] * (grads[i] - mean);
      if (logits.sigmoid) {
        const Floats v = splat(load_one(p + experts[i]));
        const Floats rest = exp_lanes(negative_part(splat(0.f) - v)) / sigmoid_denominator(v);
        grad *= rest.part[0][0];
      }
      store_one(out + experts[i], grad);
    }
    return;
  }
  load_row(p, n, x);
  const float scale = dot / fill_scores(x, n, false, shift_of(x, n, false), x);
  for (int64_t j = 0; j < n; j += kLanes) store(x + j, splat(0.f) - load(x + j) * splat(scale));
  for (int64_t i = 0; i < k; ++i) x[experts[i]] += weights[i] * grads[i];
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(out + j, load(x + j));
  if (j < n) store_part(out + j, load(x + j), n - j);
}

}  // namespace

void MINIRL_KERNEL(moe_routing)(const MoERouting& args, int64_t begin, int64_t end) {
  Scratch scratch;
  with_float(args.logits.rows.dtype, [&](auto* type) __attribute__((always_inline)) {
    for (int64_t row = begin; row < end; ++row) route_row(type, args, row, scratch);
  });
}

void MINIRL_KERNEL(moe_routing_backward)(const MoERoutingBackward& args, int64_t begin, int64_t end) {
  float x[kMaxExperts];
  with_float(args.logits.rows.dtype, [&](auto* type) __attribute__((always_inline)) {
    for (int64_t row = begin; row < end; ++row) backward_row(type, args, row, x);
  });
}

}  // namespace minirl
