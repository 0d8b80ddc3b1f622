#pragma once
#include "cpu/dispatch.h"
#include "cpu/strided_rows.h"

namespace minirl {

// logits = cap tanh(logits / cap), in place
struct SoftcapLogits {
  StridedRows logits;  // float32
  float cap;
};

MINIRL_DECLARE_KERNEL(softcap, SoftcapLogits)

}  // namespace minirl
