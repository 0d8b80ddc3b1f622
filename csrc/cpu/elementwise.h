#pragma once
#include "cpu/dispatch.h"
#include "cpu/dtypes.h"

namespace minirl {

enum class Function { kSigmoid, kSilu, kSoftplus, kGelu, kGeluTanh, kMish, kRsqrt, kExp2, kPow };

constexpr int64_t kElementwiseBlock = 1024;  // elements; a kernel's range counts in these

// out = f(x); out = grad f'(x) with a grad, which the last three functions do not take. All are contiguous and of one
// dtype; out may be x or grad.
struct Elementwise {
  Function function;
  DType dtype;
  const void *x, *grad;
  void* out;
  int64_t size;
  float a, b;  // softplus: beta and threshold; pow: the exponent
};

MINIRL_DECLARE_KERNEL(elementwise, Elementwise)

}  // namespace minirl
