// Softmax attention over spans: the queries of a sequence and the keys that they see, anywhere in the batch.
//
// The queries of all heads that share a head of keys are stacked: row r of a span is query r / group of head r % group.
// A row sums over its keys in blocks of kKeyBlock from the span's first key on, whatever other rows there are.
#pragma once
#include "cpu/dispatch.h"
#include "cpu/dtypes.h"

namespace minirl {

// A chunk of the matmul on every table, or half a chunk: a block adds one chain to an output.
constexpr int64_t kKeyBlock = 256;
// Stacked rows of a piece: whole panels on every table.
constexpr int64_t kQueryRows = 252;

struct Span {
  int64_t batch, first_query, queries, first_key, keys;  // causal: the last query sees the last key
};

// A tensor [batch, heads, rows, size], contiguous along size; strides in elements.
struct AttentionOperand {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// The block of a span's queries that begins with `first`, for one head of keys; in the backward all its queries.
struct AttentionPiece {
  int64_t span, head, first;
};

struct Attention {
  DType dtype;
  const Span* spans;
  const AttentionPiece* pieces;
  int64_t heads, group;             // heads of keys, and heads of queries that share one of them
  int64_t key_size, value_size;     // D of q and k, and of v
  int64_t most_queries, most_keys;  // the largest of any span
  float scale;
  bool causal;
  AttentionOperand q, k, v, out;
  float* stats;         // [batch, queries, heads, group, 2]: shift and sum of each row, or null
  int64_t all_queries;  // queries of a batch entry

  // Queries of a block: a function of the group alone, since sums over queries are added block by block.
  int64_t queries_at_once() const { return group < kQueryRows ? kQueryRows / group : 1; }
  // The stats of a row of the block of queries that begins with `first`.
  float* stats_of(const Span& span, int64_t head, int64_t first, int64_t row) const {
    const int64_t query = span.batch * all_queries + span.first_query + first + row / group;
    return stats + 2 * ((query * heads + head) * group + row % group);
  }
};

struct AttentionBackward {
  Attention forward;
  AttentionOperand grad_out, grad_q, grad_k, grad_v;  // each of the last three may be null
};

// over pieces
MINIRL_DECLARE_KERNEL(attention_forward, Attention)
MINIRL_DECLARE_KERNEL(attention_backward, AttentionBackward)

}  // namespace minirl
