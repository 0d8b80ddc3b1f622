// out = a b, or out += a b: [M, K] by [K, N], accumulated and written in float32.
#pragma once
#include "cpu/dispatch.h"
#include "cpu/logits.h"

namespace minirl {

struct Matrix {
  const void* data;
  int64_t row_stride, column_stride;  // in elements; one of the two is 1
};

struct Matmul {
  Matrix a, b;
  DType dtype;  // of a and b
  float* out;
  int64_t out_stride;  // from row to row
  int64_t rows, columns, depth;
  bool accumulate;
  int64_t block_rows, block_columns;  // of the output: a piece of work; no bit of the output depends on it
};

// A chunk of a block's columns, packed, is half of a second-level cache; more rows than these would not pay.
constexpr int64_t kBlockRows = 1008, kBlockColumns = 512;

static inline int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }
static inline int64_t matmul_blocks(const Matmul& args) {
  return pieces(args.rows, args.block_rows) * pieces(args.columns, args.block_columns);
}

// over the blocks of the output
MINIRL_DECLARE_KERNEL(matmul, Matmul)

}  // namespace minirl
