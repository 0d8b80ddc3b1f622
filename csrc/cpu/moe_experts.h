// The phases of a mixture of experts over its rows: pairs of a token and one of its experts, sorted by expert.
//
// Work is split into pieces, (rows of one expert) by (columns); no bit depends on the split. Pieces of one block of
// columns are neighbours, so that equal numbers of pieces are about equal work, however many rows each expert has.
#pragma once
#include "cpu/dispatch.h"
#include "cpu/dtypes.h"

namespace minirl {

// Rows of a piece: whole panels on every table. Columns: float32 results of at most half a second-level cache.
constexpr int64_t kExpertRows = 252, kExpertColumns = 512;
// Columns of the activation: its forward has two products. The gradients of the routing weights are summed by them.
constexpr int64_t kActivationColumns = 256;

struct RowBlock {
  int64_t expert, first, rows;
};

struct ExpertRows {
  DType dtype;  // of all operands that are not float*
  const RowBlock* blocks;
  int64_t num_blocks;
  const int64_t* begins;  // [E + 1]: the first row of each expert
  const int64_t* pairs;   // of each row
  const int64_t* tokens;  // of each row
};

// [E, out, in], contiguous along in; or packed expert by expert, with the stride in words
struct ExpertWeight {
  const void* data;
  int64_t expert_stride, row_stride;
  bool packed;
};

// activation = silu(gate) * up, gate and up = the halves of gate_up_proj hidden
struct ExpertsUp {
  ExpertRows rows;
  const void* hidden;  // [tokens, hidden_size]
  int64_t hidden_stride, hidden_size, intermediate_size;
  ExpertWeight gate_up_proj;
  void* activation;  // [rows, intermediate_size]
  void* gate_up;     // [rows, 2 intermediate_size], or null
};

// The gradients of ExpertsUp, with S = grad_out down_proj. Each result may be null.
struct ExpertsActivationGrad {
  ExpertRows rows;
  const void* gate_up;   // from ExpertsUp
  const void* grad_out;  // [tokens, hidden_size], contiguous
  int64_t hidden_size, intermediate_size;
  ExpertWeight down_proj;
  const float* weights;      // of each pair
  float* weight_grad_parts;  // [rows, blocks of kActivationColumns]: activation . S over each block
  void* gate_up_grad;        // [rows, 2 intermediate_size]
  void* weighted;            // [rows, intermediate_size]: weight * activation
};

// out[row, column] = the sum over depth of x[row] times the matrix of the row's expert
struct ExpertsProduct {
  ExpertRows rows;
  const void* x;  // [rows, depth], contiguous
  int64_t depth, columns;
  const void* matrix;
  int64_t expert_stride, column_stride, depth_stride;
  bool packed;
  float* out;  // [rows, columns]
};

// The number of words of a packed matrix.
struct ExpertsPackedWords {
  DType dtype;
  int64_t rows, columns;
  int64_t* words;
};
// Packs each expert's `parts` of equal height one after another, as the matmul reads them.
struct ExpertsPack {
  DType dtype;
  ExpertWeight weight;
  int64_t parts, rows, columns;  // of a part
  uint32_t* out;
};

// out[token] = the sum over its pairs, in their order, of weight * y[row of the pair]
struct ExpertsCombine {
  DType dtype;
  const float* y;  // [rows, hidden_size]
  int64_t hidden_size, top_k;
  const int64_t* row_of_pair;
  const float* weights;  // of each pair, or null: 1
  void* out;             // [tokens, hidden_size]
};

// out[expert] = the sum over its rows of left[row]^T right[row]; not written for an expert without rows
struct ExpertsWeightGrad {
  struct Side {
    const void* data;
    int64_t stride, columns;
    bool of_tokens;  // data has a row for each token, else for each row of ExpertRows
  };
  ExpertRows rows;
  int64_t num_experts;
  Side left, right;
  void* out;  // [E, left.columns, right.columns]
};

// over num_blocks times the blocks of columns
MINIRL_DECLARE_KERNEL(experts_up, ExpertsUp)
MINIRL_DECLARE_KERNEL(experts_activation_grad, ExpertsActivationGrad)
MINIRL_DECLARE_KERNEL(experts_product, ExpertsProduct)
// once
MINIRL_DECLARE_KERNEL(experts_packed_words, ExpertsPackedWords)
// over experts times parts
MINIRL_DECLARE_KERNEL(experts_pack, ExpertsPack)
// over tokens
MINIRL_DECLARE_KERNEL(experts_combine, ExpertsCombine)
// over experts times the blocks of the weight's rows and columns
MINIRL_DECLARE_KERNEL(experts_weight_grad, ExpertsWeightGrad)

}  // namespace minirl
