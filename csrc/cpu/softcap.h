#pragma once
#include "cpu/dispatch.h"

namespace minirl {

// logits[row] = cap tanh(logits[row] / cap), rows `stride` apart
struct SoftcapLogits {
  float* logits;
  int64_t vocab_size, stride;
  float cap;
};

MINIRL_DECLARE_KERNEL(softcap, SoftcapLogits)

}  // namespace minirl
