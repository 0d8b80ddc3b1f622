// Routers and experts.
#include "bindings.h"
#include "cpu/moe_routing.h"
#ifdef MINIRL_HAVE_CUDA
#include "cuda/counting_sort.h"
#endif
#include "moe_experts.h"
#include "parallel.h"

namespace py = pybind11;
using minirl::Address;
using minirl::choice;
using minirl::dtype_of;
using minirl::pointer;

namespace {

// The arguments that both calls over router logits begin with.
#define MINIRL_ROUTER_PARAMETERS                                                                                   \
  Address logits_data, const std::string &dtype, int64_t rows, int64_t num_experts, int64_t stride, int64_t top_k, \
      bool normalize, bool sigmoid, float scale
#define MINIRL_ROUTER                                                                                  \
  minirl::RouterLogits {                                                                               \
    pointer<void>(logits_data), dtype_of(dtype), num_experts, stride, top_k, normalize, sigmoid, scale \
  }
// Ranking an expert among those that were chosen so far costs about as much as this many of them.
constexpr int64_t kElementsPerChoice = 16;

// Returns the first row whose replayed experts are no such thing, or -1.
int64_t moe_routing(MINIRL_ROUTER_PARAMETERS, Address bias, int64_t num_groups, int64_t top_k_groups, Address routed,
                    const std::string& routed_dtype, int64_t routed_stride, Address valid, Address weights,
                    Address experts, Address natural, Address agreement, Address mass, Address margin) {
  using minirl::IdType;
  if (num_experts > minirl::kMaxExperts) throw std::invalid_argument("router_logits has more experts than fit");
  const auto routed_type = routed ? choice<IdType>("routed_experts' dtype", routed_dtype,
                                                   {{"torch.uint8", IdType::kUInt8},
                                                    {"torch.int8", IdType::kInt8},
                                                    {"torch.uint16", IdType::kUInt16},
                                                    {"torch.int16", IdType::kInt16},
                                                    {"torch.int32", IdType::kInt32},
                                                    {"torch.int64", IdType::kInt64}})
                                  : IdType::kInt64;
  const minirl::MoERouting args = {MINIRL_ROUTER,
                                   pointer<float>(bias),
                                   num_groups,
                                   top_k_groups,
                                   pointer<void>(routed),
                                   routed_type,
                                   routed_stride,
                                   pointer<bool>(valid),
                                   pointer<float>(weights),
                                   pointer<int64_t>(experts),
                                   pointer<int64_t>(natural),
                                   pointer<float>(agreement),
                                   pointer<float>(mass),
                                   pointer<float>(margin)};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(rows, num_experts + kElementsPerChoice * top_k,
                        MINIRL_PICK(minirl::moe_routing, minirl::MoERouting), args);
  for (int64_t row = 0; routed && row < rows; ++row)
    if (args.agreement[row] != args.agreement[row]) return row;
  return -1;
}

void moe_routing_backward(MINIRL_ROUTER_PARAMETERS, Address weights, Address experts, Address weight_grad,
                          Address out) {
  const minirl::MoERoutingBackward args = {MINIRL_ROUTER, pointer<float>(weights), pointer<int64_t>(experts),
                                           pointer<float>(weight_grad), pointer<void>(out)};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(rows, num_experts + kElementsPerChoice * top_k,
                        MINIRL_PICK(minirl::moe_routing_backward, minirl::MoERoutingBackward), args);
}

// The arguments that both calls over experts begin with.
#define MINIRL_EXPERTS_PARAMETERS                                                                                  \
  const std::string &dtype, Address experts, Address weights, int64_t tokens, int64_t top_k, int64_t num_experts,  \
      Address hidden, int64_t hidden_stride, int64_t hidden_size, int64_t intermediate_size, Address gate_up_proj, \
      int64_t gate_up_expert_stride, int64_t gate_up_row_stride, Address down_proj, int64_t down_expert_stride,    \
      int64_t down_row_stride, bool packed
#define MINIRL_EXPERTS                                                                               \
  minirl::MoEExperts {                                                                               \
    dtype_of(dtype), pointer<int64_t>(experts), pointer<float>(weights), tokens, top_k, num_experts, \
        pointer<void>(hidden), hidden_stride, hidden_size, intermediate_size,                        \
        {pointer<void>(gate_up_proj), gate_up_expert_stride, gate_up_row_stride, packed}, {          \
      pointer<void>(down_proj), down_expert_stride, down_row_stride, packed                          \
    }                                                                                                \
  }

// Returns the first token with an expert out of range, and has written nothing then; else -1.
int64_t moe_experts(MINIRL_EXPERTS_PARAMETERS, Address activation, Address y, Address gate_up, Address out) {
  const minirl::MoEExperts args = MINIRL_EXPERTS;
  py::gil_scoped_release no_gil;
  const int64_t bad_token = args.first_bad_token();
  if (bad_token < 0)
    minirl::moe_experts_forward(args, pointer<void>(activation), pointer<float>(y), pointer<void>(gate_up),
                                pointer<void>(out));
  return bad_token;
}

void pack_experts(const std::string& dtype, int64_t num_experts, Address weight, int64_t expert_stride,
                  int64_t row_stride, int64_t parts, int64_t rows, int64_t columns, Address out) {
  const minirl::ExpertWeight matrices = {pointer<void>(weight), expert_stride, row_stride, false};
  py::gil_scoped_release no_gil;
  minirl::run_pack(num_experts, {dtype_of(dtype), matrices, parts, rows, columns, pointer<uint32_t>(out)});
}

void moe_experts_backward(MINIRL_EXPERTS_PARAMETERS, Address gate_up, Address grad_out, Address gate_up_grad,
                          Address weighted, Address y, Address hidden_grad, Address weights_grad,
                          Address gate_up_proj_grad, Address down_proj_grad) {
  const minirl::MoEExperts args = MINIRL_EXPERTS;
  const minirl::MoEExpertsGrads grads = {pointer<void>(gate_up),
                                         pointer<void>(grad_out),
                                         pointer<void>(gate_up_grad),
                                         pointer<void>(weighted),
                                         pointer<float>(y),
                                         pointer<void>(hidden_grad),
                                         pointer<float>(weights_grad),
                                         pointer<void>(gate_up_proj_grad),
                                         pointer<void>(down_proj_grad)};
  py::gil_scoped_release no_gil;
  if (args.first_bad_token() >= 0) throw std::invalid_argument("experts has changed since the forward");
  minirl::moe_experts_backward(args, grads);
}

#ifdef MINIRL_HAVE_CUDA
// On the device that is current, to which all addresses belong.
void counting_sort(Address keys, int64_t items, int64_t num_keys, int64_t segments, Address places, Address begins,
                   Address order, Address stream) {
  if (segments < 1 || segments > minirl::kMostSegments) throw std::invalid_argument("segments do not fit in a block");
  const minirl::CountingSort sort = {
      pointer<int64_t>(keys), items, num_keys, segments, pointer<int64_t>(places), pointer<int64_t>(begins),
      pointer<int64_t>(order)};
  const char* const error = minirl::launch_counting_sort(sort, pointer<void>(stream));
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
  module.def("packed_words", [](const std::string& dtype, int64_t rows, int64_t columns) {
    return minirl::packed_words(dtype_of(dtype), rows, columns);
  });
#ifdef MINIRL_HAVE_CUDA
  module.def("counting_sort", ::counting_sort);
  module.attr("most_segments") = minirl::kMostSegments;
#endif
}
