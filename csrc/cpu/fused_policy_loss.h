#pragma once
#include "common/objective.h"
#include "cpu/dispatch.h"
#include "cpu/logits.h"

namespace minirl {

struct FusedPolicyLoss {
  Logits logits;
  // one per row; null: old is the token's own log-probability, behaviour is old, ref is not read
  const float *old_log_probs, *behaviour_log_probs, *ref_log_probs;
  const float *advantages, *weights;
  ObjectiveConfig config;
  float entropy_coef;
  float *log_probs, *entropy, *token_loss, *token_grad;
  Gradient out;
};

MINIRL_DECLARE_KERNEL(fused_policy_loss, FusedPolicyLoss)
// Writes only log_probs, token_loss and token_grad; they are 0 where no log-probability can make a loss overflow.
MINIRL_DECLARE_KERNEL(fused_policy_loss_overflow, FusedPolicyLoss)

}  // namespace minirl
