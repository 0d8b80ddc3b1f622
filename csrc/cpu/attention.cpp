// Attention block by block of keys, with the online softmax of Milakov and Gimelshein (arXiv 1805.02867).
//
// A key that a row does not see has weight 0. A block in which a row sees nothing leaves the row's sums unchanged to
// the last bit: they are multiplied by 1, and 0 is added. So blocks that no row of a piece sees are skipped.
#include "cpu/attention.h"

#include "cpu/gemm.h"
#include "cpu/rows.h"

namespace minirl {
namespace {

MINIRL_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
MINIRL_INLINE int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
MINIRL_INLINE void* allocate(int64_t words) { return aligned_alloc(64, (words + 15) / 16 * 64); }

// Rows of float32 scores, and the weights made of them in the same memory. A weight is no wider than its score, so that
// storing it overwrites no unread score.
template <class T>
struct Tile {
  float* scores;
  int64_t stride;

  T* weights(int64_t row) const { return (T*)(scores + row * stride); }
  // The weights as a left operand: by_row for a sum over keys, by_key for a sum over rows.
  Operand<T> by_row() const { return {weights(0), weight_stride(), 1, 0}; }
  Operand<T> by_key() const { return {weights(0), 1, weight_stride(), stride}; }
  int64_t weight_stride() const { return stride * (int64_t)(sizeof(float) / sizeof(T)); }
};
template <class T>
MINIRL_INLINE Tile<T> tile_for(const Attention& args, int64_t rows) {
  const int64_t stride = whole_lanes(least(args.most_keys, kKeyBlock));
  return {(float*)allocate(rows * stride), stride};
}

// The stacked rows of a block of a span's queries (cpu/attention.h). `first` is its first query.
struct Rows {
  int64_t first, count, group;
  int64_t keys;
  int64_t seen_before;  // keys - queries, may be negative; causal: the span's first query sees one key more
  bool causal;

  int64_t seen_by(int64_t row) const { return causal ? most(seen_before + first + row / group + 1, 0) : keys; }
  int64_t seen() const { return seen_by(count - 1); }
  // The number of keys that the row sees among `columns` keys from `key` on.
  int64_t seen_by(int64_t row, int64_t key, int64_t columns) const {
    return least(most(seen_by(row) - key, 0), columns);
  }
};
MINIRL_INLINE Rows rows_of(const Attention& args, const Span& span, int64_t first) {
  const int64_t queries = least(span.queries - first, args.queries_at_once());
  return {first, queries * args.group, args.group, span.keys, span.keys - span.queries, args.causal};
}
// The rows of the largest block.
MINIRL_INLINE int64_t most_rows(const Attention& args) {
  return least(args.most_queries, args.queries_at_once()) * args.group;
}

template <class T>
MINIRL_INLINE T* at(const AttentionOperand& x, const Span& span, int64_t head, int64_t row) {
  return (T*)x.data + span.batch * x.batch_stride + head * x.head_stride + row * x.row_stride;
}

// The stacked rows of q, out or d out for a block: row r begins at data + offsets[r].
template <class T>
struct QueryRows {
  T* data;
  int64_t* offsets;

  void move_to(const AttentionOperand& x, const Span& span, int64_t head, const Rows& rows) {
    data = at<T>(x, span, head * rows.group, span.first_query + rows.first);
    for (int64_t r = 0; r < rows.count; ++r)
      offsets[r] = r / rows.group * x.row_stride + r % rows.group * x.head_stride;
  }
  T* row(int64_t r) const { return data + offsets[r]; }
  Operand<T> by_row() const { return {data, 1, 1, 0, offsets}; }
  Operand<T> by_column(int64_t columns) const { return {data, 1, 1, columns, nullptr, offsets}; }
};
template <class T>
MINIRL_INLINE QueryRows<T> query_rows_for(int64_t rows) {
  return {nullptr, (int64_t*)allocate(2 * rows)};
}

// Keys or values as a right operand. As columns, each key is a column of the product. As terms, the product sums over
// keys.
template <class T>
MINIRL_INLINE Operand<T> keys_as_columns(const AttentionOperand& x, const Span& span, int64_t head, int64_t key) {
  return {at<T>(x, span, head, span.first_key + key), x.row_stride, 1, 0};
}
template <class T>
MINIRL_INLINE Operand<T> keys_as_terms(const AttentionOperand& x, const Span& span, int64_t head, int64_t key,
                                       int64_t size) {
  return {at<T>(x, span, head, span.first_key + key), 1, x.row_stride, size};
}

// The softmax of a row: weights are 2^((score - shift) c) / sum, with c = scale log2(e).
struct RowStats {
  float shift, sum;
};

// Adds a block to a row's softmax: its scores become 2^((score - shift) c), and 0 from `seen` on. Returns the factor by
// which to multiply the sums so far.
template <class T>
MINIRL_INLINE float weigh(const float* scores, int64_t seen, int64_t columns, float c, RowStats& row, T* weights) {
  float factor = 1.f;
  if (seen > 0) {
    const float maximum = tile_max(scores, seen);
    if (maximum > row.shift) {
      factor = exp2_one((row.shift - maximum) * c);
      row.shift = maximum;
    }
  }
  const Floats shift = splat(row.shift), cs = splat(c);
  Floats sum = splat(0.f);
  int64_t j = 0;
  for (; j < seen; j += kLanes) {
    const Floats e = exp2_lanes(bounded_exponent((load_first(scores + j, seen - j) - shift) * cs));
    sum = sum + e;
    store(weights + j, e);
  }
  for (; j < columns; j += kLanes) store(weights + j, splat(0.f));
  row.sum = row.sum * factor + sum_lanes(sum);
  return factor;
}

template <class Out>
MINIRL_INLINE void store_scaled(const float* sums, int64_t n, float factor, Out* out) {
  for (int64_t j = 0; j < n; j += kLanes)
    store_first(out + j, load_first(sums + j, least(n - j, kLanes)) * splat(factor), least(n - j, kLanes));
}

template <class T>
MINIRL_INLINE void forward(const T*, const Attention& args, int64_t begin, int64_t end) {
  const int64_t max_rows = most_rows(args), width = args.value_size;
  const float c = args.scale * kLog2E;
  const Tile<T> tile = tile_for<T>(args, max_rows);
  QueryRows<T> q = query_rows_for<T>(max_rows), out = query_rows_for<T>(max_rows);
  float* const sums = (float*)allocate(max_rows * width);
  RowStats* const stats = (RowStats*)allocate(2 * max_rows);
  uint32_t* const scratch = (uint32_t*)allocate(scratch_words<T>(most(tile.stride, width)));
  for (int64_t index = begin; index < end; ++index) {
    const AttentionPiece& piece = args.pieces[index];
    const Span& span = args.spans[piece.span];
    const Rows rows = rows_of(args, span, piece.first);
    q.move_to(args.q, span, piece.head, rows);
    out.move_to(args.out, span, piece.head, rows);
    for (int64_t r = 0; r < rows.count; ++r) stats[r] = {-INFINITY, 0.f};
    for (int64_t key = 0; key < rows.seen(); key += kKeyBlock) {
      const int64_t columns = least(rows.seen() - key, kKeyBlock);
      multiply_block<T>({q.by_row(), keys_as_columns<T>(args.k, span, piece.head, key), tile.scores, tile.stride,
                         rows.count, columns, args.key_size, false},
                        scratch);
      for (int64_t r = 0; r < rows.count; ++r) {
        const float factor =
            weigh(tile.scores + r * tile.stride, rows.seen_by(r, key, columns), columns, c, stats[r], tile.weights(r));
        if (key > 0 && factor != 1.f) store_scaled(sums + r * width, width, factor, sums + r * width);
      }
      multiply_block<T>({tile.by_row(), keys_as_terms<T>(args.v, span, piece.head, key, width), sums, width, rows.count,
                         width, columns, key > 0},
                        scratch);
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      if (stats[r].sum == 0.f)  // the row sees no key
        memset((void*)out.row(r), 0, width * sizeof(T));
      else
        store_scaled(sums + r * width, width, 1.f / stats[r].sum, out.row(r));
      if (args.stats) args.stats_of(span, piece.head, rows.first, r)[0] = stats[r].shift;
      if (args.stats) args.stats_of(span, piece.head, rows.first, r)[1] = stats[r].sum;
    }
  }
  free(scratch);
  free(stats);
  free(sums);
  free(out.offsets);
  free(q.offsets);
  free(tile.scores);
}

// out . d out of each row of a block, by the matmul. Where one key has all the weight of a row, this equals the product
// of d out and the key's value to the last bit. So the gradient of that score is exactly 0, not a
// difference of two roundings.
template <class T>
MINIRL_INLINE void inner_products(const QueryRows<T>& a, const QueryRows<T>& b, int64_t rows, int64_t size, float* out,
                                  uint32_t* scratch) {
  constexpr int64_t kSide = 16;
  float square[kSide * kSide];
  for (int64_t r = 0; r < rows; r += kSide) {
    const int64_t side = least(rows - r, kSide);
    multiply_block<T>({a.by_row().from(r), b.by_row().from(r), square, kSide, side, side, size, false}, scratch);
    for (int64_t i = 0; i < side; ++i) out[r + i] = square[i * kSide + i];
  }
}

// For a row: the weights from the scores, and the slopes from the gradient of the weights. A slope is the gradient of a
// score without the factor `scale`; delta is out . d out of the row.
template <class T>
MINIRL_INLINE void slopes(const float* scores, const float* grad_weights, int64_t seen, int64_t columns, float c,
                          RowStats row, float delta, T* weights, T* row_slopes) {
  const Floats shift = splat(row.shift), cs = splat(c), reciprocal = splat(1.f / row.sum), deltas = splat(delta);
  int64_t j = 0;
  for (; j < seen; j += kLanes) {
    const Floats e = exp2_lanes(bounded_exponent((load_first(scores + j, seen - j) - shift) * cs)), p = e * reciprocal;
    Floats slope = p * (load(grad_weights + j) - deltas);
    if (seen - j < kLanes) {  // lanes beyond the last key hold arbitrary values
      float lanes[kLanes];
      store(lanes, slope);
      for (int64_t i = seen - j; i < kLanes; ++i) lanes[i] = 0.f;
      slope = load(lanes);
    }
    store(weights + j, p);
    store(row_slopes + j, slope);
  }
  for (; j < columns; j += kLanes) {
    store(weights + j, splat(0.f));
    store(row_slopes + j, splat(0.f));
  }
}

// A piece is a whole span for one head of keys, so that every sum over queries or keys has one order.
template <class T>
MINIRL_INLINE void backward(const T*, const AttentionBackward& grads, int64_t begin, int64_t end) {
  const Attention& args = grads.forward;
  const int64_t max_rows = most_rows(args), all = args.most_queries * args.group;
  const int64_t size = args.key_size, width = args.value_size;
  const float c = args.scale * kLog2E;
  const Tile<T> tile = tile_for<T>(args, max_rows), slope_tile = tile_for<T>(args, max_rows);
  QueryRows<T> q = query_rows_for<T>(max_rows), out = query_rows_for<T>(max_rows),
               grad_out = query_rows_for<T>(max_rows);
  float* const deltas = (float*)allocate(all);
  float* const query_sums = (float*)allocate(grads.grad_q.data ? all * size : 0);
  float *const key_sums = (float*)allocate(tile.stride * size), *const value_sums =
                                                                    (float*)allocate(tile.stride * width);
  uint32_t* const scratch = (uint32_t*)allocate(scratch_words<T>(most(most(tile.stride, 16), most(size, width))));
  for (int64_t index = begin; index < end; ++index) {
    const AttentionPiece& piece = args.pieces[index];
    const Span& span = args.spans[piece.span];
    for (int64_t first = 0; first < span.queries; first += args.queries_at_once()) {
      const Rows rows = rows_of(args, span, first);
      out.move_to(args.out, span, piece.head, rows);
      grad_out.move_to(grads.grad_out, span, piece.head, rows);
      inner_products(grad_out, out, rows.count, width, deltas + first * args.group, scratch);
    }
    if (grads.grad_q.data) memset(query_sums, 0, span.queries * args.group * size * sizeof(float));
    for (int64_t key = 0; key < span.keys; key += kKeyBlock) {
      const int64_t keys = least(span.keys - key, kKeyBlock);
      memset(key_sums, 0, keys * size * sizeof(float));
      memset(value_sums, 0, keys * width * sizeof(float));
      for (int64_t first = 0; first < span.queries; first += args.queries_at_once()) {
        const Rows rows = rows_of(args, span, first);
        const int64_t columns = least(rows.seen() - key, keys);
        if (columns <= 0) continue;
        q.move_to(args.q, span, piece.head, rows);
        grad_out.move_to(grads.grad_out, span, piece.head, rows);
        multiply_block<T>({q.by_row(), keys_as_columns<T>(args.k, span, piece.head, key), tile.scores, tile.stride,
                           rows.count, columns, size, false},
                          scratch);
        multiply_block<T>({grad_out.by_row(), keys_as_columns<T>(args.v, span, piece.head, key), slope_tile.scores,
                           tile.stride, rows.count, columns, width, false},
                          scratch);
        for (int64_t r = 0; r < rows.count; ++r) {
          const float* const stats = args.stats_of(span, piece.head, first, r);
          slopes(tile.scores + r * tile.stride, slope_tile.scores + r * tile.stride, rows.seen_by(r, key, columns),
                 columns, c, {stats[0], stats[1]}, deltas[first * args.group + r], tile.weights(r),
                 slope_tile.weights(r));
        }
        if (grads.grad_v.data)
          multiply_block<T>(
              {tile.by_key(), grad_out.by_column(width), value_sums, width, columns, width, rows.count, true}, scratch);
        if (grads.grad_k.data)
          multiply_block<T>({slope_tile.by_key(), q.by_column(size), key_sums, size, columns, size, rows.count, true},
                            scratch);
        if (grads.grad_q.data)
          multiply_block<T>({slope_tile.by_row(), keys_as_terms<T>(args.k, span, piece.head, key, size),
                             query_sums + first * args.group * size, size, rows.count, size, columns, true},
                            scratch);
      }
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t row = span.first_key + key + j;
        if (grads.grad_k.data)
          store_scaled(key_sums + j * size, size, args.scale, at<T>(grads.grad_k, span, piece.head, row));
        if (grads.grad_v.data)
          store_scaled(value_sums + j * width, width, 1.f, at<T>(grads.grad_v, span, piece.head, row));
      }
    }
    for (int64_t r = 0; grads.grad_q.data && r < span.queries * args.group; ++r)
      store_scaled(
          query_sums + r * size, size, args.scale,
          at<T>(grads.grad_q, span, piece.head * args.group + r % args.group, span.first_query + r / args.group));
  }
  free(scratch);
  free(value_sums);
  free(key_sums);
  free(query_sums);
  free(deltas);
  free(grad_out.offsets);
  free(out.offsets);
  free(q.offsets);
  free(slope_tile.scores);
  free(tile.scores);
}

}  // namespace

void MINIRL_KERNEL(attention_forward)(const Attention& args, int64_t begin, int64_t end) {
  with_float(args.dtype, [&](auto* type) __attribute__((always_inline)) { forward(type, args, begin, end); });
}
void MINIRL_KERNEL(attention_backward)(const AttentionBackward& args, int64_t begin, int64_t end) {
  with_float(args.forward.dtype, [&](auto* type) __attribute__((always_inline)) { backward(type, args, begin, end); });
}

}  // namespace minirl
