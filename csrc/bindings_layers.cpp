// The layers of a model: products, attention, norms, sums and elementwise functions.
#include <algorithm>
#include <memory>

#include "attention.h"
#include "bindings.h"
#include "cpu/elementwise.h"
#include "cpu/mean.h"
#include "cpu/rms_norm.h"
#include "cpu/softmax.h"
#include "matmul.h"
#include "parallel.h"

namespace py = pybind11;
using minirl::Data;
using minirl::Field;
using minirl::OptionalData;
using minirl::OptionalTensor;
using minirl::rows_of;
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

// layout: a record of x as [B, L, R, I] with R or I contiguous (Layout of minirl_kernels/ops/mean/layout.py).
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

minirl::AttentionOperand operand_of(const Tensor& x) { return {x.data, x.stride(-4), x.stride(-3), x.stride(-2)}; }
minirl::AttentionOutput output_of(const Tensor& x) { return {x.data, x.size(-4), x.size(-3), x.size(-2), x.size(-1)}; }

// The arguments that both directions share. q [B, H, Lq, D], k and v [B, H / group, Lk, D or Dv], spans [n, 5].
minirl::Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& spans, float* stats,
                               bool causal, float scale) {
  auto inside = [](int64_t first, int64_t count, int64_t size) {
    return first >= 0 && count >= 0 && first <= size && count <= size - first;
  };
  const auto* const first_span = (const minirl::Span*)spans.as<int64_t>();
  for (int64_t i = 0; i < spans.size(-2); ++i) {
    const minirl::Span& span = first_span[i];
    if (!inside(span.batch, 1, q.size(-4)) || !inside(span.first_query, span.queries, q.size(-2)) ||
        !inside(span.first_key, span.keys, v.size(-2)))
      throw std::invalid_argument("spans has queries or keys at row " + std::to_string(i) +
                                  " that are outside of q or k: they must be within");
  }
  minirl::Attention args = {};
  args.dtype = q.float_dtype();
  args.spans = first_span;
  args.heads = v.size(-3);
  args.group = q.size(-3) / v.size(-3);
  args.key_size = q.size(-1);
  args.value_size = v.size(-1);
  args.scale = scale;
  args.causal = causal;
  args.q = operand_of(q);
  args.k = operand_of(k);
  args.v = operand_of(v);
  args.stats = stats;
  args.all_queries = q.size(-2);
  return args;
}

// out: [B, Lq, H, Dv], contiguous.
void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& spans, const Tensor& out,
               OptionalData<float> stats, bool causal, float scale) {
  const minirl::Attention args = attention_of(q, k, v, spans, stats, causal, scale);
  py::gil_scoped_release no_gil;
  minirl::run_attention(args, spans.size(-2), output_of(out));
}

// grad_out: [B, H, Lq, Dv]. Each gradient is [B, rows, heads, size], contiguous, or None.
void attention_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& spans, const Tensor& out,
                        Data<float> stats, const Tensor& grad_out, const OptionalTensor& grad_q,
                        const OptionalTensor& grad_k, const OptionalTensor& grad_v, bool causal, float scale) {
  const minirl::Attention args = attention_of(q, k, v, spans, stats, causal, scale);
  py::gil_scoped_release no_gil;
  minirl::run_attention_backward(args, spans.size(-2), output_of(out), operand_of(grad_out), output_of(grad_q),
                                 output_of(grad_k), output_of(grad_v));
}

}  // namespace

void minirl::bind_layers(py::module_& module) {
  module.def("attention", ::attention);
  module.def("attention_backward", ::attention_backward);
  module.def("elementwise", ::elementwise);
  module.def("matmul", ::matmul);
  module.def("matmul_grouped", ::matmul_grouped);
  module.def("mean", ::mean);
  module.def("rms_norm", ::rms_norm);
  module.def("rms_norm_backward", ::rms_norm_backward);
  module.def("softmax", ::softmax);
  module.def("softmax_backward", ::softmax_backward);
}
