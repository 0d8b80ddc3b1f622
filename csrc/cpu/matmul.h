// Products of matrices, one or many, cut into pieces: out = alpha a b + beta addend, summed in float32, rounded once.
#pragma once
#include "cpu/dispatch.h"
#include "cpu/dtypes.h"

namespace minirl {

struct Matrix {
  const void* data;
  int64_t row_stride, column_stride;  // in elements; one of the two is 1
};

// A block of the output of one product. Its bits do not depend on how the output is cut.
struct Piece {
  int64_t a, b, out, addend;  // where the piece begins in each tensor, in elements
  int64_t rows, columns;
  int64_t rows_left, columns_left;  // in the whole product, from the piece's first row and column on
  int64_t depth;                    // the product is 0 where the depth is 0
};

struct Matmul {
  Matrix a, b;
  DType dtype;  // of a, b and the addend
  void* out;
  DType out_dtype;     // float32, or the dtype of a and b
  int64_t out_stride;  // from row to row
  const void* addend;  // or null
  int64_t addend_stride;
  float alpha, beta;
  bool accumulate;  // onto the values in `out`, which is float32
  const Piece* pieces;
};

// A chunk of a block's columns, packed, fills half of a second-level cache; more rows would save no more time.
constexpr int64_t kBlockRows = 1120, kBlockColumns = 512;

static inline int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// over pieces
MINIRL_DECLARE_KERNEL(matmul, Matmul)

}  // namespace minirl
