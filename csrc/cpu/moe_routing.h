#pragma once
#include "cpu/dispatch.h"
#include "cpu/logits.h"

namespace minirl {

constexpr int64_t kMaxExperts = 4096;  // a row is kept on the stack

enum class IdType { kUInt8, kInt8, kUInt16, kInt16, kInt32, kInt64 };

// Rows of router logits, and how a row becomes weights.
struct RouterLogits {
  const void* data;
  DType dtype;
  int64_t num_experts, stride, top_k;
  bool normalize, sigmoid;
  float scale;
};

struct MoERouting {
  RouterLogits logits;
  const float* bias;  // one per expert, or null
  int64_t num_groups, top_k_groups;
  const void* routed;  // [rows, top_k], rows `routed_stride` apart; null where nothing is replayed
  IdType routed_type;
  int64_t routed_stride;
  const bool* valid;  // null where every row is
  float* weights;
  int64_t *experts, *natural;        // natural may be null if routed is
  float *agreement, *mass, *margin;  // agreement is NaN where a replayed row is bad, and nothing else is written there
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
