// Experts.
#include "moe_experts.h"
#include "bindings/binding.h"

namespace py = pybind11;
using minirl::Data;
using minirl::OptionalData;
using minirl::Tensor;

namespace {

// [E, out, in]; or packed words [E, words], which are int32.
minirl::ExpertWeight weight_of(const Tensor& weight) {
  const bool packed = weight.dtype == minirl::DType::kInt32;
  return {weight.data, weight.strides[0], packed ? 0 : weight.stride(-2), packed};
}

minirl::MoEExperts experts_of(const Tensor& hidden, const float* weights, const Tensor& experts,
                              const Tensor& gate_up_proj, const Tensor& down_proj, int64_t intermediate_size) {
  return {hidden.float_dtype(),    experts.as<int64_t>(), weights,           experts.size(-2), experts.size(-1),
          down_proj.sizes[0],      hidden.data,           hidden.stride(-2), hidden.size(-1),  intermediate_size,
          weight_of(gate_up_proj), weight_of(down_proj)};
}

// Returns the first token with an expert out of range, and has written nothing then; else -1.
int64_t moe_experts(const Tensor& hidden, Data<float> weights, const Tensor& experts, const Tensor& gate_up_proj,
                    const Tensor& down_proj, const Tensor& activation, Data<float> y, OptionalData<void> gate_up,
                    Data<void> out) {
  const minirl::MoEExperts args = experts_of(hidden, weights, experts, gate_up_proj, down_proj, activation.size(-1));
  py::gil_scoped_release no_gil;
  const int64_t bad_token = args.first_bad_token();
  if (bad_token < 0) minirl::moe_experts_forward(args, activation.data, y, gate_up, out);
  return bad_token;
}

// An expert's matrix as `parts` of equal height.
minirl::ExpertsPack parts_of(const Tensor& weight, int64_t parts) {
  return {weight.float_dtype(), weight_of(weight), parts, weight.size(-2) / parts, weight.size(-1), nullptr};
}

// How many words pack_experts writes for each expert.
int64_t packed_words(const Tensor& weight, int64_t parts) {
  const minirl::ExpertsPack args = parts_of(weight, parts);
  return parts * minirl::packed_words(args.dtype, args.rows, args.columns);
}

void pack_experts(const Tensor& weight, int64_t parts, Data<int32_t> out) {
  minirl::ExpertsPack args = parts_of(weight, parts);
  args.out = (uint32_t*)out.data;
  py::gil_scoped_release no_gil;
  minirl::run_pack(weight.sizes[0], args);
}

void moe_experts_backward(const Tensor& hidden, Data<float> weights, const Tensor& experts, const Tensor& gate_up_proj,
                          const Tensor& down_proj, Data<void> gate_up, Data<void> grad_out, Data<void> gate_up_grad,
                          Data<void> weighted, Data<float> y, Data<void> hidden_grad, Data<float> weights_grad,
                          Data<void> gate_up_proj_grad, Data<void> down_proj_grad) {
  const minirl::MoEExperts args = experts_of(hidden, weights, experts, gate_up_proj, down_proj, down_proj.size(-1));
  const minirl::MoEExpertsGrads grads = {gate_up,     grad_out,     gate_up_grad,      weighted,      y,
                                         hidden_grad, weights_grad, gate_up_proj_grad, down_proj_grad};
  py::gil_scoped_release no_gil;
  if (args.first_bad_token() >= 0) throw std::invalid_argument("experts has changed since the forward");
  minirl::moe_experts_backward(args, grads);
}

const minirl::Binding moe_experts_binding([](py::module_& module) {
  module.def("moe_experts", moe_experts);
  module.def("moe_experts_backward", moe_experts_backward);
  module.def("pack_experts", pack_experts);
  module.def("packed_words", packed_words);
});

}  // namespace
