// The losses over logits.
#include "bindings.h"
#include "cpu/fused_policy_loss.h"
#include "cpu/kept_logits.h"
#include "cpu/logits.h"
#include "cpu/softcap.h"
#include "cpu/token_logprobs.h"
#include "parallel.h"

namespace py = pybind11;
using minirl::Data;
using minirl::Field;
using minirl::OptionalData;
using minirl::rows_of;
using minirl::Tensor;

namespace {

minirl::Logits logits_of(const Tensor& logits, const Tensor& ids, const float* temperature) {
  return {rows_of(logits), ids.data, ids.integer_dtype(), temperature};
}

// First row whose id is neither in the vocabulary nor ignored, or -1. Checked before anything is written.
int64_t first_bad_row(const minirl::Logits& logits) {
  for (int64_t row = 0; row < logits.rows.count; ++row) {
    const int64_t id = minirl::id_of_row(logits, row);
    if (id != minirl::kIgnoreIndex && (id < 0 || id >= logits.rows.size)) return row;
  }
  return -1;
}

template <class Args>
void run_rows(const minirl::StridedRows& rows, minirl::Kernel<Args> kernel, const Args& args) {
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(rows.count, rows.size, kernel, args);
}

int64_t token_logprobs(const Tensor& logits, const Tensor& ids, Data<float> temperature, Data<float> log_probs,
                       OptionalData<float> entropy, Data<float> shift, Data<float> log_sum) {
  const minirl::TokenLogprobs args = {logits_of(logits, ids, temperature), log_probs, entropy, shift, log_sum};
  const int64_t bad_row = first_bad_row(args.logits);
  if (bad_row < 0) run_rows(args.logits.rows, MINIRL_PICK(minirl::token_logprobs, minirl::TokenLogprobs), args);
  return bad_row;
}

void token_logprobs_backward(const Tensor& logits, const Tensor& ids, Data<float> temperature, Data<float> shift,
                             Data<float> log_sum, OptionalData<float> entropy, Data<float> log_prob_grad,
                             OptionalData<float> entropy_grad, const Tensor& out, float softcap) {
  const minirl::TokenLogprobsBackward args = {logits_of(logits, ids, temperature),
                                              shift,
                                              log_sum,
                                              entropy,
                                              log_prob_grad,
                                              entropy_grad,
                                              {rows_of(out), softcap}};
  run_rows(args.logits.rows, MINIRL_PICK(minirl::token_logprobs_backward, minirl::TokenLogprobsBackward), args);
}

minirl::ObjectiveConfig objective_of(py::handle loss) {
  using minirl::KLEstimator;
  using minirl::Objective;
  static const Field<std::string> objective("objective"), kl_estimator("kl_estimator");
  static const Field<bool> clip("clip");
  static const Field<double> ratio_low("ratio_low"), ratio_high("ratio_high"), threshold("threshold"),
      kl_coef("kl_coef");
  return {minirl::choice<Objective>("objective", objective(loss),
                                    {{"minirl", Objective::kMiniRL},
                                     {"reinforce", Objective::kReinforce},
                                     {"grpo", Objective::kGrpo},
                                     {"cispo", Objective::kCispo}}),
          clip(loss),
          ratio_low(loss),
          ratio_high(loss),
          threshold(loss),
          kl_coef(loss),
          minirl::choice<KLEstimator>("kl_estimator", kl_estimator(loss),
                                      {{"k1", KLEstimator::kK1}, {"k2", KLEstimator::kK2}, {"k3", KLEstimator::kK3}})};
}

// loss: a record of the numbers of each row and of the options.
// The loss of every row and the gradient of its logits; with `only_overflow`, the results of
// fused_policy_loss_overflow.
int64_t fused_policy_loss(const Tensor& logits, const Tensor& ids, Data<float> temperature, py::handle loss,
                          py::handle results, const Tensor& out, float softcap, bool only_overflow) {
  static const Field<OptionalData<float>> old_log_probs("old_log_probs"), behaviour_log_probs("behaviour_log_probs"),
      ref_log_probs("ref_log_probs");
  static const Field<Data<float>> advantages("advantages"), weights("weights");
  static const Field<float> entropy_coef("entropy_coef");
  static const Field<Data<float>> log_probs("log_probs"), entropy("entropy"), token_loss("token_loss"),
      token_grad("token_grad");
  const minirl::FusedPolicyLoss args = {logits_of(logits, ids, temperature),
                                        old_log_probs(loss),
                                        behaviour_log_probs(loss),
                                        ref_log_probs(loss),
                                        advantages(loss),
                                        weights(loss),
                                        objective_of(loss),
                                        entropy_coef(loss),
                                        log_probs(results),
                                        entropy(results),
                                        token_loss(results),
                                        token_grad(results),
                                        {rows_of(out), softcap}};
  const int64_t bad_row = first_bad_row(args.logits);
  const auto kernel = only_overflow ? MINIRL_PICK(minirl::fused_policy_loss_overflow, minirl::FusedPolicyLoss)
                                    : MINIRL_PICK(minirl::fused_policy_loss, minirl::FusedPolicyLoss);
  if (bad_row < 0) run_rows(args.logits.rows, kernel, args);
  return bad_row;
}

void softcap(const Tensor& logits, float cap) {
  logits.as<float>();  // raises for another dtype
  const minirl::SoftcapLogits args = {rows_of(logits), cap};
  run_rows(args.logits, MINIRL_PICK(minirl::softcap, minirl::SoftcapLogits), args);
}

void kept_logits(const Tensor& logits, Data<int32_t> ids, Data<int32_t> begin, Data<int32_t> end) {
  const minirl::KeptLogits args = {rows_of(logits), ids, begin, end};
  run_rows(args.logits, MINIRL_PICK(minirl::kept_logits, minirl::KeptLogits), args);
}

}  // namespace

void minirl::bind_losses(py::module_& module) {
  module.def("fused_policy_loss", ::fused_policy_loss);
  module.def("kept_logits", ::kept_logits);
  module.def("softcap", ::softcap);
  module.def("token_logprobs", ::token_logprobs);
  module.def("token_logprobs_backward", ::token_logprobs_backward);
}
