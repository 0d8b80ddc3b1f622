#pragma once
#include "common/objective.h"
#include "cpu/dispatch.h"
#include "cpu/logits.h"

namespace minirl {

struct FusedPolicyLoss {
  Logits logits;
  // one per row; null: old is the token's own log-probability, behaviour is old
  const float *old_log_probs, *behaviour_log_probs, *ref_log_probs;
  const float *advantages, *weights;
  ObjectiveConfig config;
  float entropy_coef;
  float *log_probs, *entropy, *token_loss, *token_grad;
  Gradient out;
};

MINIRL_DECLARE_KERNEL(fused_policy_loss, FusedPolicyLoss)

}  // namespace minirl
