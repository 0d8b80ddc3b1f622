// The token-level objectives: from log-probabilities to a token's loss and its derivative.
//
// The same as minirl_kernels/objectives and kl_penalty in minirl_kernels/ops/policy_loss/reference.py, which define
// them. Sequence-level objectives and classes of a user's own do not come
// here: they are computed in torch, between two phases.
#pragma once
#include <math.h>

namespace minirl {

enum class Objective { kMiniRL, kReinforce, kGrpo, kCispo };
enum class KLEstimator { kK1, kK2, kK3 };

struct ObjectiveConfig {
  Objective objective;
  bool clip;
  double ratio_low, ratio_high;  // bounds of r, 1 - clip_ratio_low and 1 + clip_ratio_high
  double threshold;              // upper bound of the importance weight; +inf for none
  double kl_coef;                // 0: the reference log-probability is not read
  KLEstimator kl_estimator;
};

// log pi_theta, log pi_old, log mu_old and log pi_ref of the token, and its advantage
struct ObjectiveToken {
  double log_prob, old_log_prob, behaviour_log_prob, ref_log_prob, advantage;
};

// In double precision, so that it overflows only where the token's share of the loss is beyond float32 as well.
struct TokenLoss {
  double loss, grad;  // grad = d loss / d log_prob
};

// weight * factor, with 0 where one of them is 0 even if the other overflowed; NaN goes through
static inline double times(double weight, double factor) {
  const bool nothing = (factor == 0 && weight == weight) || (weight == 0 && factor == factor);
  return nothing ? 0 : weight * factor;
}

// bounds that let NaN through
static inline double at_most(double x, double bound) { return x > bound ? bound : x; }
static inline double at_least(double x, double bound) { return x < bound ? bound : x; }

static inline TokenLoss policy_term(const ObjectiveConfig& config, const ObjectiveToken& token) {
  const double advantage = token.advantage, log_r = token.log_prob - token.old_log_prob;
  const double log_w = token.log_prob - token.behaviour_log_prob, log_d = token.old_log_prob - token.behaviour_log_prob;
  const double r = exp(log_r);
  const bool above = config.clip && r > config.ratio_high, below = config.clip && r < config.ratio_low;
  const bool stopped = (advantage > 0 && above) || (advantage < 0 && below);
  if (config.objective == Objective::kMiniRL || config.objective == Objective::kReinforce) {
    const double grad = times(-at_most(exp(log_w), config.threshold), stopped ? 0 : advantage);
    return {config.objective == Objective::kMiniRL ? times(token.log_prob, grad) : grad, grad};
  }
  const bool is_cispo = config.objective == Objective::kCispo, bounded = is_cispo ? above || below : stopped;
  const double correction = exp(log_d);
  // d r as one exponential, so that a large ratio meets a small correction
  const double inside = correction > config.threshold ? config.threshold * r : exp(log_d + log_r);
  const double at_bound =
      times(at_most(correction, config.threshold), at_most(at_least(r, config.ratio_low), config.ratio_high));
  const double term = times(-(bounded ? at_bound : inside), advantage);
  if (is_cispo) return {times(token.log_prob, term), term};
  return {term, bounded ? 0 : term};
}

static inline TokenLoss kl_term(KLEstimator estimator, double log_ratio) {
  if (estimator == KLEstimator::kK1) return {-log_ratio, 1};
  if (estimator == KLEstimator::kK2) return {0.5 * log_ratio * log_ratio, -log_ratio};
  const double minus_one = expm1(log_ratio);
  return {minus_one - log_ratio, -minus_one};
}

static inline TokenLoss token_objective(const ObjectiveConfig& config, const ObjectiveToken& token) {
  TokenLoss result = policy_term(config, token);
  if (config.kl_coef != 0) {
    const TokenLoss kl = kl_term(config.kl_estimator, token.ref_log_prob - token.log_prob);
    result.loss += config.kl_coef * kl.loss;
    result.grad += config.kl_coef * kl.grad;
  }
  return result;
}

// Whether float32 holds weight * token_objective whatever the log-probability is from `lowest` to 0. Where it says no,
// float32 may still hold it. Only the bounds on `lowest` may fail for CISPO and for a KL term (needs_lowest).
static inline bool needs_lowest(const ObjectiveConfig& config) {
  return config.objective == Objective::kCispo || config.kl_coef != 0;
}
static inline bool always_fits(const ObjectiveConfig& config, const ObjectiveToken& token, double weight,
                               double lowest) {
  // exp(kMostLog) kMostFactor^2 is below float32's largest
  constexpr double kMostLog = 40, kMostFactor = 1e10;
  const bool weights_fit = -token.old_log_prob < kMostLog && -token.behaviour_log_prob < kMostLog &&
                           token.old_log_prob - token.behaviour_log_prob < kMostLog;
  const bool factors_fit = fabs(weight * token.advantage) < kMostFactor && fabs(weight) < kMostFactor;
  if (!weights_fit || !factors_fit) return false;
  if (!needs_lowest(config)) return true;
  const double gap = token.ref_log_prob - lowest;
  const bool kl_fits = gap < (config.kl_estimator == KLEstimator::kK3 ? kMostLog : kMostFactor) &&
                       -token.ref_log_prob < kMostFactor && config.kl_coef * weight < kMostFactor;
  return -lowest < kMostFactor && (config.kl_coef == 0 || kl_fits);
}

}  // namespace minirl
