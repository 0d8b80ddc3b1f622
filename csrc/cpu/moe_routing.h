#pragma once
#include "cpu/dispatch.h"
#include "cpu/strided_rows.h"

namespace minirl {

constexpr int64_t kMaxExperts = 4096;  // a row is kept on the stack

// Rows of router logits, and how a row becomes weights.
struct RouterLogits {
  StridedRows rows;  // a row has a logit for each expert
  int64_t top_k;
  bool normalize, sigmoid;
  float scale;
};

struct MoERouting {
  RouterLogits logits;
  const float* bias;  // one per expert, or null
  int64_t num_groups, top_k_groups;
  const void* routed;  // [rows, top_k], rows `routed_stride` apart; null where nothing is replayed
  DType routed_dtype;
  int64_t routed_stride;
  const bool* valid;  // null where every row is valid
  float* weights;
  int64_t *experts, *natural;        // natural may be null where routed is null
  float *agreement, *mass, *margin;  // a bad replayed row gets NaN as agreement, and nothing else
};

struct MoERoutingBackward {
  RouterLogits logits;
  const float* weights;
  const int64_t* experts;
  const float* weight_grad;
  void* out;  // contiguous, of the dtype of the logits
};

MINIRL_DECLARE_KERNEL(moe_routing, MoERouting)
MINIRL_DECLARE_KERNEL(moe_routing_backward, MoERoutingBackward)

}  // namespace minirl
