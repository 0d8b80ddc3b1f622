// RMSNorm.
#include <algorithm>
#include <memory>

#include "bindings/binding.h"
#include "cpu/rms_norm.h"
#include "parallel.h"

namespace py = pybind11;
using minirl::Data;
using minirl::OptionalData;
using minirl::rows_of;
using minirl::Tensor;

namespace {

void rms_norm(const Tensor& x, OptionalData<float> weight, double eps, const Tensor& out, Data<float> rstd) {
  const minirl::RmsNorm args = {rows_of(x), rows_of(out), weight, eps, rstd};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(args.x.count, args.x.size, MINIRL_PICK(minirl::rms_norm, minirl::RmsNorm), args);
}

// d x where `out` is not empty, and d weight where `weight_grad` is not.
void rms_norm_backward(const Tensor& x, const Tensor& grad, OptionalData<float> weight, Data<float> rstd,
                       const Tensor& out, Data<float> weight_grad) {
  using Args = minirl::RmsNormBackward;
  const minirl::StridedRows x_rows = rows_of(x);
  const int64_t rows = x_rows.count, size = x_rows.size, blocks = minirl::sum_blocks(rows);
  const std::unique_ptr<float[]> partials(weight_grad.data ? new float[blocks * size] : nullptr);
  const Args args = {x_rows, rows_of(grad), rows_of(out), weight, rstd, partials.get(), weight_grad};
  py::gil_scoped_release no_gil;
  if (out.data) minirl::parallel_rows(rows, size, MINIRL_PICK(minirl::rms_norm_backward, Args), args);
  if (!weight_grad.data) return;
  minirl::parallel_rows(blocks * minirl::strips(size), std::min(rows, minirl::kSumBlock) * minirl::kStrip,
                        MINIRL_PICK(minirl::rms_norm_weight_partials, Args), args);
  minirl::parallel_rows(size, blocks, MINIRL_PICK(minirl::rms_norm_weight_grad, Args), args);
}

const minirl::Binding rms_norm_binding([](py::module_& module) {
  module.def("rms_norm", rms_norm);
  module.def("rms_norm_backward", rms_norm_backward);
});

}  // namespace
