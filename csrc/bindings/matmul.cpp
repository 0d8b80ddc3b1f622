// Products of matrices.
#include "matmul.h"
#include "bindings/binding.h"

namespace py = pybind11;
using minirl::OptionalTensor;
using minirl::Tensor;

namespace {

// A matrix [rows, columns] or a batch of matrices. The stride of a dimension of one element is free.
minirl::Matrix matrix_of(const Tensor& x) {
  const int64_t rows = x.size(-2), columns = x.size(-1);
  minirl::Matrix matrix = {x.data, x.stride(-2), columns == 1 ? 1 : x.stride(-1)};
  if (matrix.column_stride != 1 && (rows == 1 || rows * columns == 0)) matrix.row_stride = 1;
  return matrix;
}

// The operands that the kernels cannot read, since neither rows nor columns are contiguous.
constexpr int kCopyA = 1, kCopyB = 2;
int copies_wanted(const minirl::Matmul& args) {
  auto readable = [](const minirl::Matrix& x) { return x.row_stride == 1 || x.column_stride == 1; };
  return (readable(args.a) ? 0 : kCopyA) | (readable(args.b) ? 0 : kCopyB);
}

minirl::Matmul matmul_of(const Tensor& out, const Tensor& a, const Tensor& b) {
  return {matrix_of(a), matrix_of(b), a.float_dtype(), out.data, out.float_dtype(), out.stride(-2), nullptr, 0,
          1.f,          1.f,          false,           nullptr};
}

minirl::Piece whole_product(const Tensor& a, const Tensor& b) {
  return minirl::whole_product(a.size(-2), b.size(-1), a.size(-1));
}

// out = alpha a b + beta addend, or with `accumulate` out += a b. Returns which of a and b must be copied first, and
// has written nothing then, else 0.
int matmul(const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& addend, float alpha, float beta,
           bool accumulate, int64_t threads) {
  minirl::Matmul args = matmul_of(out, a, b);
  if (const int copies = copies_wanted(args)) return copies;
  args.addend = addend.data;
  args.addend_stride = addend.stride(-2);
  args.alpha = alpha;
  args.beta = beta;
  args.accumulate = accumulate;
  const minirl::BatchStrides strides = {a.stride(-3), b.stride(-3), out.stride(-3), addend.stride(-3)};
  py::gil_scoped_release no_gil;
  minirl::multiply_batch(args, out.dims == 3 ? out.size(-3) : 1, strides, ::whole_product(a, b), threads);
  return 0;
}

// Returns as matmul does, and the first group whose end is out of order or out of range, else -1.
std::pair<int, int64_t> matmul_grouped(const Tensor& out, const Tensor& a, const Tensor& b, const std::string& grouped,
                                       const Tensor& ends, int64_t threads) {
  using minirl::Grouped;
  const auto kind = minirl::choice<Grouped>(
      "grouped", grouped, {{"rows", Grouped::kRows}, {"columns", Grouped::kColumns}, {"terms", Grouped::kTerms}});
  const minirl::Matmul args = matmul_of(out, a, b);
  if (const int copies = copies_wanted(args)) return {copies, -1};
  const minirl::BatchStrides strides = {a.stride(-3), b.stride(-3), out.stride(-3), 0};
  const int32_t* const group_ends = ends.as<int32_t>();
  py::gil_scoped_release no_gil;
  return {0, minirl::multiply_groups(args, kind, group_ends, ends.numel(), strides, ::whole_product(a, b), threads)};
}

const minirl::Binding matmul_binding([](py::module_& module) {
  module.def("matmul", matmul);
  module.def("matmul_grouped", matmul_grouped);
});

}  // namespace
