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
  int64_t block_rows;  // a piece of work is block_rows by kBlockColumns of the output, whatever number of threads
};

constexpr int64_t kBlockColumns = 512;

static inline int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }
static inline int64_t matmul_blocks(const Matmul& args) {
  return pieces(args.rows, args.block_rows) * pieces(args.columns, kBlockColumns);
}

// over the blocks of the output
MINIRL_DECLARE_KERNEL(matmul, Matmul)

}  // namespace minirl
