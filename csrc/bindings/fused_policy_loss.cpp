// The policy loss from logits.
#include "cpu/fused_policy_loss.h"
#include "bindings/binding.h"
#include "bindings/logits.h"

namespace py = pybind11;
using minirl::Data;
using minirl::Field;
using minirl::OptionalData;
using minirl::rows_of;
using minirl::Tensor;

namespace {

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
  const minirl::FusedPolicyLoss args = {minirl::logits_of(logits, ids, temperature),
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
  const int64_t bad_row = minirl::first_bad_row(args.logits);
  const auto kernel = only_overflow ? MINIRL_PICK(minirl::fused_policy_loss_overflow, minirl::FusedPolicyLoss)
                                    : MINIRL_PICK(minirl::fused_policy_loss, minirl::FusedPolicyLoss);
  if (bad_row < 0) minirl::run_rows(args.logits.rows, kernel, args);
  return bad_row;
}

const minirl::Binding fused_policy_loss_binding([](py::module_& module) {
  module.def("fused_policy_loss", fused_policy_loss);
});

}  // namespace
