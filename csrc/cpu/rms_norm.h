#pragma once
#include "cpu/dispatch.h"
#include "cpu/strided_rows.h"
#include "cpu/sum_blocks.h"

namespace minirl {

// out = x rstd weight, rstd = 1 / sqrt(mean(x^2) + eps)
struct RmsNorm {
  StridedRows x, out;   // of one dtype
  const float* weight;  // [size], or null
  int64_t size;
  double eps;
  float* rstd;  // one per row
};

struct RmsNormBackward {
  StridedRows x, grad, out;  // of one dtype; out = d x
  const float *weight, *rstd;
  int64_t rows, size;
  float* partials;     // [blocks of rows, size]
  float* weight_grad;  // [size] = the sum of partials
};

MINIRL_DECLARE_KERNEL(rms_norm, RmsNorm)
MINIRL_DECLARE_KERNEL(rms_norm_backward, RmsNormBackward)         // by row
MINIRL_DECLARE_KERNEL(rms_norm_weight_partials, RmsNormBackward)  // by block of rows and strip of columns
MINIRL_DECLARE_KERNEL(rms_norm_weight_grad, RmsNormBackward)      // by column

}  // namespace minirl
