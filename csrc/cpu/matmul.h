// Products of matrices, one or many, cut into pieces: out = alpha a b + beta addend, summed in float32, rounded once.
#pragma once
#include "cpu/dispatch.h"
#include "cpu/dtypes.h"

namespace minirl {

struct Matrix {
  const void* data;
  int64_t row_stride, column_stride;  // in elements; one of the two is 1
};

// A block of the output of one of the products. No bit of it depends on how the output is cut.
struct Piece {
  int64_t a, b, out, addend;  // where it begins in each, in elements
  int64_t rows, columns;
  int64_t rows_left, columns_left;  // from its first one on, in all of the product
  int64_t depth;                    // where it is 0, so is the product
};

struct Matmul {
  Matrix a, b;
  DType dtype;  // of a, b and the addend
  void* out;
  DType out_dtype;     // float32, or that of a and b
  int64_t out_stride;  // from row to row
  const void* addend;  // or null
  int64_t addend_stride;
  float alpha, beta;
  bool accumulate;  // to what is in `out`, which is float32
  const Piece* pieces;
};

// A chunk of a block's columns, packed, is half of a second-level cache; more rows than these would not pay.
constexpr int64_t kBlockRows = 1120, kBlockColumns = 512;

static inline int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// over pieces
MINIRL_DECLARE_KERNEL(matmul, Matmul)

}  // namespace minirl
