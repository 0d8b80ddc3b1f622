// Routers.
#include "cpu/moe_routing.h"
#include "bindings/binding.h"
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

const minirl::Binding moe_routing_binding([](py::module_& module) {
  module.def("moe_routing", moe_routing);
  module.def("moe_routing_backward", moe_routing_backward);
});

}  // namespace
