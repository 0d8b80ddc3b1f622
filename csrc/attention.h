// Attention over torch's threads, forward and backward, piece by piece. The caller owns all memory but the list of
// pieces.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/attention.h"
#include "cpu/pages.h"
#include "parallel.h"

namespace minirl {

// A contiguous tensor [batch, rows, heads, size] for a result. data may be null.
struct AttentionOutput {
  void* data;
  int64_t batch, rows, heads, size;

  AttentionOperand operand() const { return {data, rows * heads * size, size, heads * size}; }
  // Rows in no span become 0. `covered` is the number of rows in a span.
  void clear(DType dtype, int64_t covered) const {
    const int64_t row_bytes = heads * size * bytes_of(dtype);
    if (data && covered < batch * rows) write_zeros(data, batch * rows * row_bytes);
  }
};

// The list of pieces: blocks of the spans' queries for each head of keys. Its order gives threads with equally many
// pieces about equal work.
class AttentionPieces {
 public:
  AttentionPieces(const Span* spans, int64_t num_spans) : spans_(spans), num_spans_(num_spans) {
    for (int64_t i = 0; i < num_spans; ++i) {
      most_queries_ = std::max(most_queries_, spans[i].queries);
      most_keys_ = std::max(most_keys_, spans[i].keys);
      queries_ += spans[i].queries;
      if (spans[i].queries > 0) keys_ += spans[i].keys;  // without queries nothing writes the keys' gradients
      products_ += spans[i].queries * spans[i].keys;
    }
  }

  // At least 1: run divides by the queries of a piece, and scratch memory for rows and scores is never of 0 bytes.
  void describe(Attention& args) const {
    args.spans = spans_;
    args.most_queries = std::max<int64_t>(most_queries_, 1);
    args.most_keys = std::max<int64_t>(most_keys_, 1);
  }
  int64_t queries() const { return queries_; }
  int64_t keys() const { return keys_; }

  // attention: the Attention in `args`, which gets the list of pieces.
  template <class Args>
  void run(Attention& attention, const Args& args, int64_t queries_of_a_piece, Kernel<Args> kernel) {
    std::vector<AttentionPiece> pieces;
    for (int64_t head = 0; head < attention.heads; ++head) {
      for (int64_t span = 0; span < num_spans_; ++span) {
        // alternately from both ends: the last block of a causal span is the longest
        const int64_t blocks = (spans_[span].queries + queries_of_a_piece - 1) / queries_of_a_piece;
        for (int64_t i = 0; i < blocks; ++i)
          pieces.push_back({span, head, (i % 2 ? blocks - 1 - i / 2 : i / 2) * queries_of_a_piece});
      }
    }
    attention.pieces = pieces.data();
    if (pieces.empty()) return;
    // sixteen multiply-adds cost about as much as moving one element
    const int64_t products = products_ * attention.heads * attention.group;
    const int64_t elements = products * (attention.key_size + attention.value_size) / kProductsPerElement;
    parallel_rows((int64_t)pieces.size(), elements / (int64_t)pieces.size(), kernel, args);
  }

 private:
  static constexpr int64_t kProductsPerElement = 16;
  const Span* spans_;
  int64_t num_spans_, most_queries_ = 0, most_keys_ = 0, queries_ = 0, keys_ = 0, products_ = 0;
};

static inline void run_attention(Attention args, int64_t num_spans, const AttentionOutput& out) {
  AttentionPieces pieces(args.spans, num_spans);
  pieces.describe(args);
  out.clear(args.dtype, pieces.queries());
  AttentionOutput{args.stats, out.batch, out.rows, out.heads, 2}.clear(DType::kFloat32, pieces.queries());
  args.out = out.operand();
  pieces.run(args, args, args.queries_at_once(), MINIRL_PICK_PRODUCT(attention_forward, Attention));
}

// Each of grad_q, grad_k and grad_v may have null data. A piece is a whole span for one head of keys.
static inline void run_attention_backward(Attention args, int64_t num_spans, const AttentionOutput& out,
                                          const AttentionOperand& grad_out, const AttentionOutput& grad_q,
                                          const AttentionOutput& grad_k, const AttentionOutput& grad_v) {
  AttentionPieces pieces(args.spans, num_spans);
  pieces.describe(args);
  grad_q.clear(args.dtype, pieces.queries());
  grad_k.clear(args.dtype, pieces.keys());
  grad_v.clear(args.dtype, pieces.keys());
  args.out = out.operand();
  AttentionBackward grads = {args, grad_out, grad_q.operand(), grad_k.operand(), grad_v.operand()};
  pieces.run(grads.forward, grads, args.most_queries, MINIRL_PICK_PRODUCT(attention_backward, AttentionBackward));
}

}  // namespace minirl
