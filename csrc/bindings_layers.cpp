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
using minirl::Address;
using minirl::choice;
using minirl::dtype_of;
using minirl::pointer;

namespace {

void elementwise(const std::string& name, const std::string& dtype, Address x, Address grad, Address out, int64_t size,
                 float a, float b) {
  using minirl::Function;
  const auto function = choice<Function>("function", name,
                                         {{"silu", Function::kSilu},
                                          {"rsqrt", Function::kRsqrt},
                                          {"sigmoid", Function::kSigmoid},
                                          {"gelu", Function::kGelu},
                                          {"gelu_tanh", Function::kGeluTanh},
                                          {"softplus", Function::kSoftplus},
                                          {"pow", Function::kPow},
                                          {"mish", Function::kMish},
                                          {"exp2", Function::kExp2}});
  const minirl::Elementwise args = {
      function, dtype_of(dtype), pointer<void>(x), pointer<void>(grad), pointer<void>(out), size, a, b};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows((size + minirl::kElementwiseBlock - 1) / minirl::kElementwiseBlock, minirl::kElementwiseBlock,
                        MINIRL_PICK(minirl::elementwise, minirl::Elementwise), args);
}

// The item that is so far from the end of a tensor's sizes or strides, 0 beyond its first.
int64_t from_end(const py::tuple& numbers, size_t place) {
  const size_t count = PyTuple_GET_SIZE(numbers.ptr());
  return place > count ? 0 : PyLong_AsLongLong(PyTuple_GET_ITEM(numbers.ptr(), count - place));
}

// Of a tensor [rows, columns], or a batch of them. The stride of a dimension of one element is free.
struct Operand {
  int64_t rows, columns, batch_stride;
  minirl::Matrix matrix;

  Operand(Address address, const py::tuple& sizes, const py::tuple& strides)
      : rows(from_end(sizes, 2)),
        columns(from_end(sizes, 1)),
        batch_stride(from_end(strides, 3)),
        matrix{pointer<void>(address), from_end(strides, 2), columns == 1 ? 1 : from_end(strides, 1)} {
    if (matrix.column_stride != 1 && (rows == 1 || rows * columns == 0)) matrix.row_stride = 1;
  }
  // Whether the kernels can read it.
  bool runs_along_memory() const { return matrix.row_stride == 1 || matrix.column_stride == 1; }
};

// The arguments that both calls over matrices begin with: sizes and strides as torch has them.
#define MINIRL_MATMUL_PARAMETERS                                                                         \
  Address out_address, const py::tuple &out_strides, const std::string &out_dtype, Address a_address,    \
      const py::tuple &a_sizes, const py::tuple &a_strides, Address b_address, const py::tuple &b_sizes, \
      const py::tuple &b_strides, const std::string &dtype, int64_t threads
#define MINIRL_MATMUL                                                                                               \
  minirl::Matmul {                                                                                                  \
    a.matrix, b.matrix, dtype_of(dtype), pointer<void>(out_address), dtype_of(out_dtype), from_end(out_strides, 2), \
        nullptr, 0, 1.f, 1.f, false, nullptr                                                                        \
  }
constexpr int kCopyA = 1, kCopyB = 2;
int copies_wanted(const Operand& a, const Operand& b) {
  return (a.runs_along_memory() ? 0 : kCopyA) | (b.runs_along_memory() ? 0 : kCopyB);
}

// out = alpha a b + beta addend, or with `accumulate` out += a b. Returns which of a and b must be copied first, and
// has written nothing then, else 0.
int matmul(MINIRL_MATMUL_PARAMETERS, int64_t batch, Address addend, const py::tuple& addend_strides, float alpha,
           float beta, bool accumulate) {
  const Operand a(a_address, a_sizes, a_strides), b(b_address, b_sizes, b_strides);
  if (const int copies = copies_wanted(a, b)) return copies;
  minirl::Matmul args = MINIRL_MATMUL;
  args.addend = pointer<void>(addend);
  args.addend_stride = from_end(addend_strides, 2);
  args.alpha = alpha;
  args.beta = beta;
  args.accumulate = accumulate;
  const minirl::BatchStrides strides = {a.batch_stride, b.batch_stride, from_end(out_strides, 3),
                                        from_end(addend_strides, 3)};
  py::gil_scoped_release no_gil;
  minirl::multiply_batch(args, batch, strides, minirl::whole_product(a.rows, b.columns, a.columns), threads);
  return 0;
}

// Returns the same, and the first group whose end is out of order or out of range, else -1.
std::pair<int, int64_t> matmul_grouped(MINIRL_MATMUL_PARAMETERS, const std::string& grouped, Address ends,
                                       int64_t groups) {
  using minirl::Grouped;
  const auto kind = choice<Grouped>(
      "grouped", grouped, {{"rows", Grouped::kRows}, {"columns", Grouped::kColumns}, {"terms", Grouped::kTerms}});
  const Operand a(a_address, a_sizes, a_strides), b(b_address, b_sizes, b_strides);
  if (const int copies = copies_wanted(a, b)) return {copies, -1};
  const minirl::Matmul args = MINIRL_MATMUL;
  const minirl::BatchStrides strides = {a.batch_stride, b.batch_stride, from_end(out_strides, 3), 0};
  py::gil_scoped_release no_gil;
  return {0, minirl::multiply_groups(args, kind, pointer<int32_t>(ends), groups, strides,
                                     minirl::whole_product(a.rows, b.columns, a.columns), threads)};
}

// Rows of contiguous elements, as the calls over them take each of their tensors.
#define MINIRL_ROWS_PARAMETERS(name) \
  Address name, int64_t name##_length, int64_t name##_batch_stride, int64_t name##_length_stride
#define MINIRL_ROWS(name, dtype) \
  minirl::StridedRows { pointer<void>(name), dtype, name##_length, name##_batch_stride, name##_length_stride }

void softmax(MINIRL_ROWS_PARAMETERS(x), const std::string& dtype, int64_t rows, int64_t size, bool log, Address out,
             const std::string& out_dtype) {
  const minirl::Softmax args = {MINIRL_ROWS(x, dtype_of(dtype)),
                                minirl::contiguous_rows(pointer<void>(out), dtype_of(out_dtype), size), size, log};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(rows, size, MINIRL_PICK(minirl::softmax, minirl::Softmax), args);
}

void softmax_backward(MINIRL_ROWS_PARAMETERS(grad), MINIRL_ROWS_PARAMETERS(output), const std::string& dtype,
                      int64_t rows, int64_t size, bool log, Address out, const std::string& out_dtype) {
  const minirl::SoftmaxBackward args = {MINIRL_ROWS(grad, dtype_of(dtype)), MINIRL_ROWS(output, dtype_of(dtype)),
                                        minirl::contiguous_rows(pointer<void>(out), dtype_of(out_dtype), size), size,
                                        log};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(rows, size, MINIRL_PICK(minirl::softmax_backward, minirl::SoftmaxBackward), args);
}

void rms_norm(MINIRL_ROWS_PARAMETERS(x), const std::string& dtype, int64_t rows, int64_t size, Address weight,
              double eps, Address out, Address rstd) {
  const minirl::RmsNorm args = {MINIRL_ROWS(x, dtype_of(dtype)),
                                minirl::contiguous_rows(pointer<void>(out), dtype_of(dtype), size),
                                pointer<float>(weight),
                                size,
                                eps,
                                pointer<float>(rstd)};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(rows, size, MINIRL_PICK(minirl::rms_norm, minirl::RmsNorm), args);
}

// d x where there is an `out` for it, and d weight where there is a `weight_grad`.
void rms_norm_backward(MINIRL_ROWS_PARAMETERS(x), MINIRL_ROWS_PARAMETERS(grad), const std::string& dtype, int64_t rows,
                       int64_t size, Address weight, Address rstd, Address out, Address weight_grad) {
  using Args = minirl::RmsNormBackward;
  const int64_t blocks = minirl::sum_blocks(rows);
  const std::unique_ptr<float[]> partials(weight_grad ? new float[blocks * size] : nullptr);
  const Args args = {MINIRL_ROWS(x, dtype_of(dtype)),
                     MINIRL_ROWS(grad, dtype_of(dtype)),
                     minirl::contiguous_rows(pointer<void>(out), dtype_of(dtype), size),
                     pointer<float>(weight),
                     pointer<float>(rstd),
                     rows,
                     size,
                     partials.get(),
                     pointer<float>(weight_grad)};
  py::gil_scoped_release no_gil;
  if (out) minirl::parallel_rows(rows, size, MINIRL_PICK(minirl::rms_norm_backward, Args), args);
  if (!weight_grad) return;
  minirl::parallel_rows(blocks * minirl::strips(size), std::min(rows, minirl::kSumBlock) * minirl::kStrip,
                        MINIRL_PICK(minirl::rms_norm_weight_partials, Args), args);
  minirl::parallel_rows(size, blocks, MINIRL_PICK(minirl::rms_norm_weight_grad, Args), args);
}

// x [rows, reduced, inner] with one of the last two contiguous.
void mean(MINIRL_ROWS_PARAMETERS(x), const std::string& dtype, int64_t rows, int64_t reduced, int64_t reduced_stride,
          int64_t inner, double divisor, Address out, const std::string& out_dtype) {
  using minirl::Mean;
  const int64_t blocks = minirl::sum_blocks(reduced);
  const std::unique_ptr<float[]> partials(blocks > 1 ? new float[rows * blocks * inner] : nullptr);
  const Mean args = {MINIRL_ROWS(x, dtype_of(dtype)),
                     reduced,
                     reduced_stride,
                     inner,
                     divisor,
                     partials.get(),
                     pointer<void>(out),
                     dtype_of(out_dtype)};
  py::gil_scoped_release no_gil;
  const int64_t terms = std::min(reduced, minirl::kSumBlock);
  if (inner == 1)
    minirl::parallel_rows(rows * blocks, terms, MINIRL_PICK(minirl::mean_rows, Mean), args);
  else
    minirl::parallel_rows(rows * blocks * minirl::strips(inner), terms * std::min(inner, minirl::kStrip),
                          MINIRL_PICK(minirl::mean_columns, Mean), args);
  if (blocks > 1) minirl::parallel_rows(rows * inner, blocks, MINIRL_PICK(minirl::mean_of_blocks, Mean), args);
}

// The arguments that both calls of attention begin with.
#define MINIRL_STRIDES(name) \
  Address name, int64_t name##_batch_stride, int64_t name##_head_stride, int64_t name##_row_stride
#define MINIRL_STRIDED(name) \
  minirl::AttentionOperand { pointer<void>(name), name##_batch_stride, name##_head_stride, name##_row_stride }
#define MINIRL_ATTENTION_PARAMETERS                                                                                    \
  const std::string &dtype, Address spans, int64_t num_spans, int64_t batch, int64_t queries, int64_t keys,            \
      int64_t heads, int64_t group, int64_t key_size, int64_t value_size, float scale, bool causal, MINIRL_STRIDES(q), \
      MINIRL_STRIDES(k), MINIRL_STRIDES(v), Address out, Address stats
#define MINIRL_ATTENTION                                                                                             \
  minirl::Attention {                                                                                                \
    dtype_of(dtype), pointer<minirl::Span>(spans), nullptr, heads, group, key_size, value_size, 0, 0, scale, causal, \
        MINIRL_STRIDED(q), MINIRL_STRIDED(k), MINIRL_STRIDED(v), {}, pointer<float>(stats), queries                  \
  }

void check_spans(const minirl::Span* spans, int64_t num_spans, int64_t batch, int64_t queries, int64_t keys) {
  auto inside = [](int64_t first, int64_t count, int64_t size) {
    return first >= 0 && count >= 0 && first <= size && count <= size - first;
  };
  for (int64_t i = 0; i < num_spans; ++i)
    if (!inside(spans[i].batch, 1, batch) || !inside(spans[i].first_query, spans[i].queries, queries) ||
        !inside(spans[i].first_key, spans[i].keys, keys))
      throw std::invalid_argument("spans has queries or keys at row " + std::to_string(i) +
                                  " that are outside of q or k: they must be within");
}

void attention(MINIRL_ATTENTION_PARAMETERS) {
  const minirl::Attention args = MINIRL_ATTENTION;
  check_spans(args.spans, num_spans, batch, queries, keys);
  py::gil_scoped_release no_gil;
  minirl::run_attention(args, num_spans, {pointer<void>(out), batch, queries, heads * group, value_size});
}

void attention_backward(MINIRL_ATTENTION_PARAMETERS, MINIRL_STRIDES(grad_out), Address grad_q, Address grad_k,
                        Address grad_v) {
  const minirl::Attention args = MINIRL_ATTENTION;
  check_spans(args.spans, num_spans, batch, queries, keys);
  py::gil_scoped_release no_gil;
  minirl::run_attention_backward(
      args, num_spans, {pointer<void>(out), batch, queries, heads * group, value_size}, MINIRL_STRIDED(grad_out),
      {pointer<void>(grad_q), batch, queries, heads * group, key_size},
      {pointer<void>(grad_k), batch, keys, heads, key_size}, {pointer<void>(grad_v), batch, keys, heads, value_size});
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
