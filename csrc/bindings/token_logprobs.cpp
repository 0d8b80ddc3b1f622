// Log-probabilities of tokens from logits.
#include "cpu/token_logprobs.h"
#include "bindings/binding.h"
#include "bindings/logits.h"

namespace py = pybind11;
using minirl::Data;
using minirl::OptionalData;
using minirl::rows_of;
using minirl::Tensor;

namespace {

int64_t token_logprobs(const Tensor& logits, const Tensor& ids, Data<float> temperature, Data<float> log_probs,
                       OptionalData<float> entropy, Data<float> shift, Data<float> log_sum) {
  const minirl::TokenLogprobs args = {minirl::logits_of(logits, ids, temperature), log_probs, entropy, shift, log_sum};
  const int64_t bad_row = minirl::first_bad_row(args.logits);
  if (bad_row < 0) minirl::run_rows(args.logits.rows, MINIRL_PICK(minirl::token_logprobs, minirl::TokenLogprobs), args);
  return bad_row;
}

void token_logprobs_backward(const Tensor& logits, const Tensor& ids, Data<float> temperature, Data<float> shift,
                             Data<float> log_sum, OptionalData<float> entropy, Data<float> log_prob_grad,
                             OptionalData<float> entropy_grad, const Tensor& out, float softcap) {
  const minirl::TokenLogprobsBackward args = {minirl::logits_of(logits, ids, temperature),
                                              shift,
                                              log_sum,
                                              entropy,
                                              log_prob_grad,
                                              entropy_grad,
                                              {rows_of(out), softcap}};
  minirl::run_rows(args.logits.rows, MINIRL_PICK(minirl::token_logprobs_backward, minirl::TokenLogprobsBackward), args);
}

const minirl::Binding token_logprobs_binding([](py::module_& module) {
  module.def("token_logprobs", token_logprobs);
  module.def("token_logprobs_backward", token_logprobs_backward);
});

}  // namespace
