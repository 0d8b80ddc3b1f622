// A mixture of experts over torch's threads, phase by phase. The caller owns all memory but the sorted pairs.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/moe_experts.h"
#include "cpu/pages.h"
#include "parallel.h"

namespace minirl {

// The inputs of the forward and of the backward.
struct MoEExperts {
  DType dtype;
  const int64_t* experts;  // [tokens, top_k]
  const float* weights;    // [tokens, top_k]
  int64_t tokens, top_k, num_experts;
  const void* hidden;
  int64_t hidden_stride, hidden_size, intermediate_size;
  ExpertWeight gate_up_proj, down_proj;

  int64_t pairs() const { return tokens * top_k; }
  // First token with an expert out of range, or -1.
  int64_t first_bad_token() const {
    for (int64_t pair = 0; pair < pairs(); ++pair)
      if (experts[pair] < 0 || experts[pair] >= num_experts) return pair / top_k;
    return -1;
  }
};

// Pairs of a token and one of its experts, sorted by expert and then by token.
class SortedPairs {
 public:
  // All experts are in range.
  explicit SortedPairs(const MoEExperts& args)
      : begins_(args.num_experts + 1), pairs_(args.pairs()), tokens_(args.pairs()), row_of_pair_(args.pairs()) {
    for (int64_t pair = 0; pair < args.pairs(); ++pair) ++begins_[args.experts[pair] + 1];
    for (int64_t expert = 0; expert < args.num_experts; ++expert) begins_[expert + 1] += begins_[expert];
    std::vector<int64_t> next(begins_);
    for (int64_t pair = 0; pair < args.pairs(); ++pair) {
      const int64_t row = next[args.experts[pair]]++;
      pairs_[row] = pair;
      tokens_[row] = pair / args.top_k;
      row_of_pair_[pair] = row;
    }
    for (int64_t expert = 0; expert < args.num_experts; ++expert)
      for (int64_t row = begins_[expert]; row < begins_[expert + 1]; row += kExpertRows)
        blocks_.push_back({expert, row, std::min(begins_[expert + 1] - row, kExpertRows)});
  }

  ExpertRows rows(DType dtype) const {
    return {dtype, blocks_.data(), (int64_t)blocks_.size(), begins_.data(), pairs_.data(), tokens_.data()};
  }
  const int64_t* row_of_pair() const { return row_of_pair_.data(); }
  int64_t pair(int64_t row) const { return pairs_[row]; }

 private:
  std::vector<int64_t> begins_, pairs_, tokens_, row_of_pair_;
  std::vector<RowBlock> blocks_;
};

static inline int64_t blocks_of(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

// A piece packs its columns however few rows it has, so its least cost is the cost of packing.
template <class Args>
void run_pieces(const ExpertRows& rows, int64_t columns, int64_t width, int64_t depth, Kernel<Args> kernel,
                const Args& args) {
  parallel_rows(rows.num_blocks * blocks_of(columns, width), std::min(columns, width) * depth, kernel, args);
}

static inline int64_t packed_words(DType dtype, int64_t rows, int64_t columns) {
  int64_t words;
  MINIRL_PICK_PRODUCT(experts_packed_words, ExpertsPackedWords)({dtype, rows, columns, &words}, 0, 1);
  return words;
}
static inline void run_pack(int64_t num_experts, const ExpertsPack& args) {
  parallel_rows(num_experts * args.parts, args.rows * args.columns, MINIRL_PICK_PRODUCT(experts_pack, ExpertsPack),
                args);
}

static inline void run_combine(const MoEExperts& args, const SortedPairs& sorted, const float* y, const float* weights,
                               void* out) {
  parallel_rows(args.tokens, args.top_k * args.hidden_size, MINIRL_PICK_PRODUCT(experts_combine, ExpertsCombine),
                {args.dtype, y, args.hidden_size, args.top_k, sorted.row_of_pair(), weights, out});
}

static inline void run_weight_grad(const ExpertsWeightGrad& args) {
  const int64_t rows = args.left.columns, columns = args.right.columns;
  const int64_t bytes = rows * columns * bytes_of(args.rows.dtype);
  for (int64_t expert = 0; expert < args.num_experts; ++expert)
    if (args.rows.begins[expert] == args.rows.begins[expert + 1]) write_zeros((char*)args.out + expert * bytes, bytes);
  const int64_t blocks = blocks_of(rows, kExpertRows) * blocks_of(columns, kExpertColumns) * args.num_experts;
  parallel_rows(blocks, kExpertRows * kExpertColumns, MINIRL_PICK_PRODUCT(experts_weight_grad, ExpertsWeightGrad),
                args);
}

// activation [pairs, I] and y [pairs, H] float32 are scratch; gate_up [pairs, 2 I] may be null; out [tokens, H].
static inline void moe_experts_forward(const MoEExperts& args, void* activation, float* y, void* gate_up, void* out) {
  const SortedPairs sorted(args);
  const ExpertRows rows = sorted.rows(args.dtype);
  const int64_t hidden_size = args.hidden_size, width = args.intermediate_size;
  run_pieces(rows, width, kActivationColumns, 2 * hidden_size, MINIRL_PICK_PRODUCT(experts_up, ExpertsUp),
             {rows, args.hidden, args.hidden_stride, hidden_size, width, args.gate_up_proj, activation, gate_up});
  run_pieces(rows, hidden_size, kExpertColumns, width, MINIRL_PICK_PRODUCT(experts_product, ExpertsProduct),
             {rows, activation, width, hidden_size, args.down_proj.data, args.down_proj.expert_stride,
              args.down_proj.row_stride, 1, args.down_proj.packed, y});
  run_combine(args, sorted, y, args.weights, out);
}

// Each gradient may be null. gate_up_grad [pairs, 2 I], weighted [pairs, I] and y [pairs, H] float32 are scratch:
// gate_up_grad is null without d hidden and d gate_up_proj, weighted without d down_proj, and y without d hidden.
struct MoEExpertsGrads {
  const void *gate_up, *grad_out;
  void *gate_up_grad, *weighted;
  float* y;
  void* hidden;
  float* weights;
  void *gate_up_proj, *down_proj;
};

static inline void moe_experts_backward(const MoEExperts& args, const MoEExpertsGrads& grads) {
  const SortedPairs sorted(args);
  const ExpertRows rows = sorted.rows(args.dtype);
  const int64_t hidden_size = args.hidden_size, width = args.intermediate_size;
  const int64_t parts = blocks_of(width, kActivationColumns);
  std::vector<float> weight_grad_parts(grads.weights ? args.pairs() * parts : 0);
  run_pieces(rows, width, kActivationColumns, hidden_size,
             MINIRL_PICK_PRODUCT(experts_activation_grad, ExpertsActivationGrad),
             {rows, grads.gate_up, grads.grad_out, hidden_size, width, args.down_proj, args.weights,
              grads.weights ? weight_grad_parts.data() : nullptr, grads.gate_up_grad, grads.weighted});
  for (int64_t row = 0; grads.weights && row < args.pairs(); ++row) {
    float sum = 0.f;
    for (int64_t part = 0; part < parts; ++part) sum += weight_grad_parts[row * parts + part];
    grads.weights[sorted.pair(row)] = sum;
  }
  if (grads.hidden) {
    run_pieces(rows, hidden_size, kExpertColumns, 2 * width, MINIRL_PICK_PRODUCT(experts_product, ExpertsProduct),
               {rows, grads.gate_up_grad, 2 * width, hidden_size, args.gate_up_proj.data,
                args.gate_up_proj.expert_stride, 1, args.gate_up_proj.row_stride, false, grads.y});
    run_combine(args, sorted, grads.y, nullptr, grads.hidden);
  }
  if (grads.gate_up_proj)
    run_weight_grad({rows,
                     args.num_experts,
                     {grads.gate_up_grad, 2 * width, 2 * width, false},
                     {args.hidden, args.hidden_stride, hidden_size, true},
                     grads.gate_up_proj});
  if (grads.down_proj)
    run_weight_grad({rows,
                     args.num_experts,
                     {grads.grad_out, hidden_size, hidden_size, true},
                     {grads.weighted, width, width, false},
                     grads.down_proj});
}

}  // namespace minirl
