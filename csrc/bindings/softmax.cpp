// Softmax and log-softmax.
#include "cpu/softmax.h"
#include "bindings/binding.h"
#include "parallel.h"

namespace py = pybind11;
using minirl::rows_of;
using minirl::Tensor;

namespace {

void softmax(const Tensor& x, const Tensor& out, bool log) {
  const minirl::Softmax args = {rows_of(x), rows_of(out), log};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(args.x.count, args.x.size, MINIRL_PICK(minirl::softmax, minirl::Softmax), args);
}

void softmax_backward(const Tensor& grad, const Tensor& output, const Tensor& out, bool log) {
  const minirl::SoftmaxBackward args = {rows_of(grad), rows_of(output), rows_of(out), log};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(args.out.count, args.out.size, MINIRL_PICK(minirl::softmax_backward, minirl::SoftmaxBackward),
                        args);
}

const minirl::Binding softmax_binding([](py::module_& module) {
  module.def("softmax", softmax);
  module.def("softmax_backward", softmax_backward);
});

}  // namespace
