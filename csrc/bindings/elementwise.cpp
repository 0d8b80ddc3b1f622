// Elementwise functions.
#include "cpu/elementwise.h"
#include "bindings/binding.h"
#include "parallel.h"

namespace py = pybind11;
using minirl::Data;
using minirl::OptionalData;
using minirl::Tensor;

namespace {

// x, grad and out lie in memory alike.
void elementwise(const std::string& name, const Tensor& x, OptionalData<void> grad, Data<void> out, float a, float b) {
  using minirl::Function;
  const auto function = minirl::choice<Function>("function", name,
                                                 {{"silu", Function::kSilu},
                                                  {"rsqrt", Function::kRsqrt},
                                                  {"sigmoid", Function::kSigmoid},
                                                  {"gelu", Function::kGelu},
                                                  {"gelu_tanh", Function::kGeluTanh},
                                                  {"softplus", Function::kSoftplus},
                                                  {"pow", Function::kPow},
                                                  {"mish", Function::kMish},
                                                  {"exp2", Function::kExp2}});
  const minirl::Elementwise args = {function, x.float_dtype(), x.data, grad, out, x.numel(), a, b};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows((args.size + minirl::kElementwiseBlock - 1) / minirl::kElementwiseBlock,
                        minirl::kElementwiseBlock, MINIRL_PICK(minirl::elementwise, minirl::Elementwise), args);
}

const minirl::Binding elementwise_binding([](py::module_& module) { module.def("elementwise", elementwise); });

}  // namespace
