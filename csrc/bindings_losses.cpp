// The losses over logits.
#include "bindings.h"
#include "cpu/fused_policy_loss.h"
#include "cpu/kept_logits.h"
#include "cpu/logits.h"
#include "cpu/softcap.h"
#include "cpu/token_logprobs.h"
#include "parallel.h"

namespace py = pybind11;
using minirl::Address;
using minirl::choice;
using minirl::dtype_of;
using minirl::pointer;

namespace {

// First row whose id is neither in the vocabulary nor ignored, or -1; asked before anything is written.
int64_t first_bad_row(const minirl::Logits& logits) {
  for (int64_t row = 0; row < logits.batch * logits.length; ++row) {
    const int64_t id = minirl::id_of_row(logits, row);
    if (id != minirl::kIgnoreIndex && (id < 0 || id >= logits.vocab_size)) return row;
  }
  return -1;
}

// The arguments that every call over logits begins with.
#define MINIRL_LOGITS_PARAMETERS                                                                    \
  Address logits_data, const std::string &dtype, int64_t batch, int64_t length, int64_t vocab_size, \
      int64_t batch_stride, int64_t length_stride, Address ids, bool wide_ids, Address temperature
#define MINIRL_LOGITS                                                                                    \
  minirl::Logits {                                                                                       \
    pointer<void>(logits_data), dtype_of(dtype), batch, length, vocab_size, batch_stride, length_stride, \
        pointer<void>(ids), wide_ids, pointer<float>(temperature)                                        \
  }

// Those that every call over a gradient of the logits ends with.
#define MINIRL_GRADIENT_PARAMETERS \
  Address out, const std::string &out_dtype, int64_t out_batch_stride, int64_t out_length_stride, float softcap
#define MINIRL_GRADIENT \
  minirl::Gradient { pointer<void>(out), dtype_of(out_dtype), out_batch_stride, out_length_stride, softcap }

template <class Args>
void run_rows(const minirl::Logits& logits, minirl::Kernel<Args> kernel, const Args& args) {
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(logits.batch * logits.length, logits.vocab_size, kernel, args);
}

int64_t token_logprobs(MINIRL_LOGITS_PARAMETERS, Address log_probs, Address entropy, Address shift, Address log_sum) {
  const minirl::TokenLogprobs args = {MINIRL_LOGITS, pointer<float>(log_probs), pointer<float>(entropy),
                                      pointer<float>(shift), pointer<float>(log_sum)};
  const int64_t bad_row = first_bad_row(args.logits);
  if (bad_row < 0) run_rows(args.logits, MINIRL_PICK(minirl::token_logprobs, minirl::TokenLogprobs), args);
  return bad_row;
}

void token_logprobs_backward(MINIRL_LOGITS_PARAMETERS, Address shift, Address log_sum, Address entropy,
                             Address log_prob_grad, Address entropy_grad, MINIRL_GRADIENT_PARAMETERS) {
  const minirl::TokenLogprobsBackward args = {
      MINIRL_LOGITS,           pointer<float>(shift),         pointer<float>(log_sum),
      pointer<float>(entropy), pointer<float>(log_prob_grad), pointer<float>(entropy_grad),
      MINIRL_GRADIENT};
  run_rows(args.logits, MINIRL_PICK(minirl::token_logprobs_backward, minirl::TokenLogprobsBackward), args);
}

// The loss of every row and the gradient of its logits; or, if `only_overflow`, what fused_policy_loss_overflow writes.
int64_t fused_policy_loss(MINIRL_LOGITS_PARAMETERS, Address old_log_probs, Address behaviour_log_probs,
                          Address ref_log_probs, Address advantages, Address weights, const std::string& objective,
                          bool clip, double ratio_low, double ratio_high, double threshold, double kl_coef,
                          const std::string& kl_estimator, float entropy_coef, Address log_probs, Address entropy,
                          Address token_loss, Address token_grad, MINIRL_GRADIENT_PARAMETERS, bool only_overflow) {
  using minirl::KLEstimator;
  using minirl::Objective;
  const auto kind = choice<Objective>("objective", objective,
                                      {{"minirl", Objective::kMiniRL},
                                       {"reinforce", Objective::kReinforce},
                                       {"grpo", Objective::kGrpo},
                                       {"cispo", Objective::kCispo}});
  const auto estimator = choice<KLEstimator>(
      "kl_estimator", kl_estimator, {{"k1", KLEstimator::kK1}, {"k2", KLEstimator::kK2}, {"k3", KLEstimator::kK3}});
  const minirl::FusedPolicyLoss args = {MINIRL_LOGITS,
                                        pointer<float>(old_log_probs),
                                        pointer<float>(behaviour_log_probs),
                                        pointer<float>(ref_log_probs),
                                        pointer<float>(advantages),
                                        pointer<float>(weights),
                                        {kind, clip, ratio_low, ratio_high, threshold, kl_coef, estimator},
                                        entropy_coef,
                                        pointer<float>(log_probs),
                                        pointer<float>(entropy),
                                        pointer<float>(token_loss),
                                        pointer<float>(token_grad),
                                        MINIRL_GRADIENT};
  const int64_t bad_row = first_bad_row(args.logits);
  const auto kernel = only_overflow ? MINIRL_PICK(minirl::fused_policy_loss_overflow, minirl::FusedPolicyLoss)
                                    : MINIRL_PICK(minirl::fused_policy_loss, minirl::FusedPolicyLoss);
  if (bad_row < 0) run_rows(args.logits, kernel, args);
  return bad_row;
}

void softcap(Address logits, int64_t rows, int64_t vocab_size, int64_t stride, float cap) {
  const minirl::SoftcapLogits args = {pointer<float>(logits), vocab_size, stride, cap};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(rows, vocab_size, MINIRL_PICK(minirl::softcap, minirl::SoftcapLogits), args);
}

void kept_logits(Address logits, const std::string& dtype, int64_t batch, int64_t length, int64_t vocab_size,
                 int64_t batch_stride, int64_t length_stride, Address ids, Address begin, Address end) {
  const minirl::KeptLogits args = {pointer<void>(logits),
                                   dtype_of(dtype),
                                   batch,
                                   length,
                                   vocab_size,
                                   batch_stride,
                                   length_stride,
                                   pointer<int32_t>(ids),
                                   pointer<int32_t>(begin),
                                   pointer<int32_t>(end)};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(batch * length, vocab_size, MINIRL_PICK(minirl::kept_logits, minirl::KeptLogits), args);
}

}  // namespace

void minirl::bind_losses(py::module_& module) {
  module.def("fused_policy_loss", ::fused_policy_loss);
  module.def("kept_logits", ::kept_logits);
  module.def("softcap", ::softcap);
  module.def("token_logprobs", ::token_logprobs);
  module.def("token_logprobs_backward", ::token_logprobs_backward);
}
