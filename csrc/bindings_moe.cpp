// Routers and experts.
#include "bindings.h"
#include "cpu/moe_routing.h"
#ifdef MINIRL_HAVE_CUDA
#include "cuda/counting_sort.h"
#endif
#include "moe_experts.h"
#include "parallel.h"

namespace py = pybind11;
using minirl::Data;
using minirl::Field;
using minirl::OptionalData;
using minirl::OptionalTensor;
using minirl::rows_of;
using minirl::Tensor;

namespace {

// Ranking an expert among the chosen ones costs about as much as this many elements.
constexpr int64_t kElementsPerChoice = 16;

minirl::RouterLogits router_of(const Tensor& logits, py::handle options) {
  static const Field<int64_t> top_k("top_k");
  static const Field<bool> normalize("normalize"), sigmoid("sigmoid");
  static const Field<float> scale("scale");
  return {rows_of(logits), top_k(options), normalize(options), sigmoid(options), scale(options)};
}

template <class Args>
void run_router(minirl::Kernel<Args> kernel, const Args& args) {
  py::gil_scoped_release no_gil;
  const minirl::StridedRows& rows = args.logits.rows;
  minirl::parallel_rows(rows.count, rows.size + kElementsPerChoice * args.logits.top_k, kernel, args);
}

// Returns the first row whose replayed experts are out of range or repeat one, or -1.
int64_t moe_routing(const Tensor& logits, OptionalData<float> bias, const OptionalTensor& routed,
                    OptionalData<bool> valid, py::handle options, Data<float> weights, Data<int64_t> experts,
                    Data<int64_t> natural, Data<float> agreement, Data<float> mass, Data<float> margin) {
  static const Field<int64_t> num_groups("num_groups"), top_k_groups("top_k_groups");
  if (logits.size(-1) > minirl::kMaxExperts) throw std::invalid_argument("router_logits has more experts than fit");
  const minirl::MoERouting args = {router_of(logits, options),
                                   bias,
                                   num_groups(options),
                                   top_k_groups(options),
                                   routed.data,
                                   routed.data ? routed.integer_dtype() : minirl::DType::kInt64,
                                   routed.stride(-2),
                                   valid,
                                   weights,
                                   experts,
                                   natural,
                                   agreement,
                                   mass,
                                   margin};
  run_router(MINIRL_PICK(minirl::moe_routing, minirl::MoERouting), args);
  for (int64_t row = 0; args.routed && row < args.logits.rows.count; ++row)
    if (args.agreement[row] != args.agreement[row]) return row;
  return -1;
}

void moe_routing_backward(const Tensor& logits, py::handle options, Data<float> weights, Data<int64_t> experts,
                          Data<float> weight_grad, Data<void> out) {
  const minirl::MoERoutingBackward args = {router_of(logits, options), weights, experts, weight_grad, out};
  run_router(MINIRL_PICK(minirl::moe_routing_backward, minirl::MoERoutingBackward), args);
}

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

#ifdef MINIRL_HAVE_CUDA
// On the current device, which holds all the tensors. places: [segments, num_keys] of scratch.
void counting_sort(const Tensor& keys, const Tensor& places, Data<int64_t> begins, Data<int64_t> order,
                   uintptr_t stream) {
  const int64_t segments = places.size(-2);
  if (segments < 1 || segments > minirl::kMostSegments) throw std::invalid_argument("segments do not fit in a block");
  const minirl::CountingSort sort = {
      keys.as<int64_t>(), keys.numel(), places.size(-1), segments, places.as<int64_t>(), begins, order};
  const char* const error = minirl::launch_counting_sort(sort, (void*)stream);
  if (error) throw std::runtime_error(std::string("the counting sort did not start on the GPU: ") + error);
}
#endif

}  // namespace

void minirl::bind_moe(py::module_& module) {
  module.def("moe_experts", ::moe_experts);
  module.def("moe_experts_backward", ::moe_experts_backward);
  module.def("moe_routing", ::moe_routing);
  module.def("moe_routing_backward", ::moe_routing_backward);
  module.def("pack_experts", ::pack_experts);
  module.def("packed_words", ::packed_words);
#ifdef MINIRL_HAVE_CUDA
  module.def("counting_sort", ::counting_sort);
  module.attr("most_segments") = minirl::kMostSegments;
#endif
}
