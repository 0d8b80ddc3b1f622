#pragma once
#include "cpu/dispatch.h"
#include "cpu/strided_rows.h"

namespace minirl {

// out = softmax of each row of x, or its logarithm.
struct Softmax {
  StridedRows x, out;  // out is of x's dtype, or float32
  bool log;
};

// out = d x, from `output`, the result of Softmax, and `grad`, its gradient.
struct SoftmaxBackward {
  StridedRows grad, output, out;  // of one dtype, except that out may be 16-bit where the others are float32
  bool log;
};

MINIRL_DECLARE_KERNEL(softmax, Softmax)
MINIRL_DECLARE_KERNEL(softmax_backward, SoftmaxBackward)

}  // namespace minirl
