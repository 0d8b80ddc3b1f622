#pragma once
#include "cpu/dispatch.h"
#include "cpu/logits.h"

namespace minirl {

struct TokenLogprobs {
  Logits logits;
  float *log_probs, *entropy, *shift, *log_sum;  // one per row; entropy may be null
};

struct TokenLogprobsBackward {
  Logits logits;
  const float *shift, *log_sum, *entropy;
  const float *log_prob_grad, *entropy_grad;  // entropy and entropy_grad may both be null
  Gradient out;
};

MINIRL_DECLARE_KERNEL(token_logprobs, TokenLogprobs)
MINIRL_DECLARE_KERNEL(token_logprobs_backward, TokenLogprobsBackward)

}  // namespace minirl
