// The token-level objectives: from log-probabilities to a token's loss and its derivative.
//
// The same as token_objective and kl_penalty in minirl_kernels/ops/policy_loss/reference.py, which defines them;
// compiled by the CPU kernels and by CUDA. Sequence-level objectives do not come here: their sums over a response
// are taken in torch, between two phases.
#pragma once
#include <math.h>

#include "common/shared.h"

namespace minirl {

enum class Objective { kMiniRL, kReinforce, kGrpo, kCispo };
enum class KLEstimator { kK1, kK2, kK3 };

struct ObjectiveConfig {
  Objective objective;
  bool clip;
  float ratio_low, ratio_high;  // bounds of r, 1 - clip_ratio_low and 1 + clip_ratio_high
  float threshold;              // upper bound of the importance weight; +inf for none
  float kl_coef;                // 0: the reference log-probability is not read
  KLEstimator kl_estimator;
};

// log pi_theta, log pi_old, log mu_old and log pi_ref of the token, and its advantage
struct ObjectiveToken {
  float log_prob, old_log_prob, behaviour_log_prob, ref_log_prob, advantage;
};

struct TokenLoss {
  float loss, grad;  // grad = d loss / d log_prob
};

// weight * factor, with 0 where the factor is 0 even if the weight overflowed
MINIRL_SHARED float times(float weight, float factor) { return factor == 0.f ? 0.f : weight * factor; }
// bounds that let NaN through
MINIRL_SHARED float at_most(float x, float bound) { return x > bound ? bound : x; }
MINIRL_SHARED float at_least(float x, float bound) { return x < bound ? bound : x; }
MINIRL_SHARED float exp_of(float x) { return (float)exp((double)x); }

MINIRL_SHARED TokenLoss policy_term(const ObjectiveConfig& config, const ObjectiveToken& token) {
  const float advantage = token.advantage;
  const float r = exp_of(token.log_prob - token.old_log_prob);
  if (config.objective == Objective::kMiniRL || config.objective == Objective::kReinforce) {
    const float weight = at_most(exp_of(token.log_prob - token.behaviour_log_prob), config.threshold);
    const bool stopped =
        config.clip && ((advantage > 0.f && r > config.ratio_high) || (advantage < 0.f && r < config.ratio_low));
    const float grad = times(-weight, stopped ? 0.f : advantage);
    return {config.objective == Objective::kMiniRL ? times(token.log_prob, grad) : grad, grad};
  }
  const float correction = at_most(exp_of(token.old_log_prob - token.behaviour_log_prob), config.threshold);
  const float bounded = config.clip ? at_most(at_least(r, config.ratio_low), config.ratio_high) : r;
  if (config.objective == Objective::kCispo) {
    const float grad = times(-(correction * bounded), advantage);
    return {times(token.log_prob, grad), grad};
  }
  const float unclipped = times(correction * r, advantage), clipped = times(correction * bounded, advantage);
  const bool stopped = unclipped > clipped;
  return {stopped ? -clipped : -unclipped, stopped ? 0.f : -unclipped};
}

MINIRL_SHARED TokenLoss kl_term(KLEstimator estimator, float log_ratio) {
  if (estimator == KLEstimator::kK1) return {-log_ratio, 1.f};
  if (estimator == KLEstimator::kK2) return {0.5f * log_ratio * log_ratio, -log_ratio};
  const float minus_one = (float)expm1((double)log_ratio);
  return {minus_one - log_ratio, -minus_one};
}

MINIRL_SHARED TokenLoss token_objective(const ObjectiveConfig& config, const ObjectiveToken& token) {
  TokenLoss result = policy_term(config, token);
  if (config.kl_coef != 0.f) {
    const TokenLoss kl = kl_term(config.kl_estimator, token.ref_log_prob - token.log_prob);
    result.loss += config.kl_coef * kl.loss;
    result.grad += config.kl_coef * kl.grad;
  }
  return result;
}

}  // namespace minirl
