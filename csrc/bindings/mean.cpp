// Means and sums.
#include <algorithm>
#include <memory>

#include "bindings/binding.h"
#include "cpu/mean.h"
#include "parallel.h"

namespace py = pybind11;
using minirl::Field;
using minirl::Tensor;

namespace {

// layout: a record of x as [B, L, R, I] with R or I contiguous (Layout of minirl_kernels/ops/mean/layout.py).
// divisor: 1 for a sum. The kernels sum R in blocks; with several blocks, mean_of_blocks adds their partial sums.
void mean(py::handle layout, double divisor, const Tensor& out) {
  using minirl::Mean;
  static const Field<minirl::Elements> elements("x");
  static const Field<int64_t> batch("batch"), length("length"), reduced("reduced"), inner("inner"),
      batch_stride("batch_stride"), length_stride("length_stride"), reduced_stride("reduced_stride");
  const minirl::Elements x = elements(layout);
  const int64_t rows = batch(layout) * length(layout), terms = reduced(layout), columns = inner(layout);
  const int64_t blocks = minirl::sum_blocks(terms);
  const std::unique_ptr<float[]> partials(blocks > 1 ? new float[rows * blocks * columns] : nullptr);
  const Mean args = {
      {x.data, x.float_dtype(), rows, terms * columns, length(layout), batch_stride(layout), length_stride(layout)},
      terms,
      reduced_stride(layout),
      columns,
      divisor,
      partials.get(),
      out.data,
      out.float_dtype()};
  py::gil_scoped_release no_gil;
  const int64_t most_terms = std::min(terms, minirl::kSumBlock);
  if (columns == 1)
    minirl::parallel_rows(rows * blocks, most_terms, MINIRL_PICK(minirl::mean_rows, Mean), args);
  else
    minirl::parallel_rows(rows * blocks * minirl::strips(columns), most_terms * std::min(columns, minirl::kStrip),
                          MINIRL_PICK(minirl::mean_columns, Mean), args);
  if (blocks > 1) minirl::parallel_rows(rows * columns, blocks, MINIRL_PICK(minirl::mean_of_blocks, Mean), args);
}

const minirl::Binding mean_binding([](py::module_& module) { module.def("mean", mean); });

}  // namespace
