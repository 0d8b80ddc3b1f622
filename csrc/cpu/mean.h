#pragma once
#include "cpu/dispatch.h"
#include "cpu/strided_rows.h"
#include "cpu/sum_blocks.h"

namespace minirl {

// out [rows, I]: the sums over R of x [rows, R, I], divided by `divisor`, which is 1 for a sum. Either I is 1 and R is
// contiguous, or I is contiguous.
struct Mean {
  StridedRows x;  // a row is one [R, I]
  int64_t reduced, reduced_stride, inner;
  double divisor;
  float* partials;  // [rows, blocks of R, I] with several blocks, for mean_of_blocks
  void* out;
  DType out_dtype;  // the dtype of x, or float32
};

MINIRL_DECLARE_KERNEL(mean_rows, Mean)       // I = 1; by row and block
MINIRL_DECLARE_KERNEL(mean_columns, Mean)    // by row, block and strip of columns
MINIRL_DECLARE_KERNEL(mean_of_blocks, Mean)  // by element of out

}  // namespace minirl
