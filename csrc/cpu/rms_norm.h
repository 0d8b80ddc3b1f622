#pragma once
#include "cpu/dispatch.h"
#include "cpu/strided_rows.h"
#include "cpu/sum_blocks.h"

namespace minirl {

// out = x rstd weight, rstd = 1 / sqrt(mean(x^2) + eps)
struct RmsNorm {
  StridedRows x, out;   // of one dtype
  const float* weight;  // one per column, or null
  double eps;
  float* rstd;  // one per row
};

struct RmsNormBackward {
  StridedRows x, grad, out;  // of one dtype; out = d x
  const float *weight, *rstd;
  float* partials;     // [blocks of rows, columns]
  float* weight_grad;  // one per column: the sum of partials
};

MINIRL_DECLARE_KERNEL(rms_norm, RmsNorm)
MINIRL_DECLARE_KERNEL(rms_norm_backward, RmsNormBackward)         // by row
MINIRL_DECLARE_KERNEL(rms_norm_weight_partials, RmsNormBackward)  // by block of rows and strip of columns
MINIRL_DECLARE_KERNEL(rms_norm_weight_grad, RmsNormBackward)      // by column

}  // namespace minirl
