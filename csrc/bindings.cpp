// pybind11 module _C: raw pointers and sizes in, nothing of torch. The Python side has checked shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "cpu/elementwise.h"
#include "cpu/fused_policy_loss.h"
#include "cpu/isa.h"
#include "cpu/logits.h"
#include "cpu/mean.h"
#include "cpu/moe_routing.h"
#include "cpu/pages.h"
#include "cpu/rms_norm.h"
#include "cpu/softcap.h"
#include "cpu/softmax.h"
#include "cpu/token_logprobs.h"
#ifdef MINIRL_HAVE_CUDA
#include "cuda/counting_sort.h"
#endif
#include "matmul.h"
#include "moe_experts.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

minirl::DType dtype_of(const std::string& name) {
  if (name == "torch.float32") return minirl::DType::kFloat32;
  if (name == "torch.bfloat16") return minirl::DType::kBFloat16;
  if (name == "torch.float16") return minirl::DType::kFloat16;
  throw std::invalid_argument("dtype is " + name + ": it must be torch.float32, torch.bfloat16 or torch.float16");
}

template <class Enum>
Enum choice(const char* what, const std::string& name, std::initializer_list<std::pair<const char*, Enum>> choices) {
  for (const auto& [known, value] : choices)
    if (name == known) return value;
  throw std::invalid_argument(std::string(what) + " is '" + name + "', which the kernel does not have");
}

// First row whose id is neither in the vocabulary nor ignored, or -1; asked before anything is written.
int64_t first_bad_row(const minirl::Logits& logits) {
  for (int64_t row = 0; row < logits.batch * logits.length; ++row) {
    const int64_t id = minirl::id_of_row(logits, row);
    if (id != minirl::kIgnoreIndex && (id < 0 || id >= logits.vocab_size)) return row;
  }
  return -1;
}

// The arguments that every call over logits begins with.
#define MINIRL_LOGITS_PARAMETERS                                                                    \
  Address logits_data, const std::string &dtype, int64_t batch, int64_t length, int64_t vocab_size, \
      int64_t batch_stride, int64_t length_stride, Address ids, bool wide_ids, Address temperature
#define MINIRL_LOGITS                                                                                    \
  minirl::Logits {                                                                                       \
    pointer<void>(logits_data), dtype_of(dtype), batch, length, vocab_size, batch_stride, length_stride, \
        pointer<void>(ids), wide_ids, pointer<float>(temperature)                                        \
  }

// Those that every call over a gradient of the logits ends with.
#define MINIRL_GRADIENT_PARAMETERS \
  Address out, const std::string &out_dtype, int64_t out_batch_stride, int64_t out_length_stride, float softcap
#define MINIRL_GRADIENT \
  minirl::Gradient { pointer<void>(out), dtype_of(out_dtype), out_batch_stride, out_length_stride, softcap }

template <class Args>
void run_rows(const minirl::Logits& logits, minirl::Kernel<Args> kernel, const Args& args) {
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(logits.batch * logits.length, logits.vocab_size, kernel, args);
}

int64_t token_logprobs(MINIRL_LOGITS_PARAMETERS, Address log_probs, Address entropy, Address shift, Address log_sum) {
  const minirl::TokenLogprobs args = {MINIRL_LOGITS, pointer<float>(log_probs), pointer<float>(entropy),
                                      pointer<float>(shift), pointer<float>(log_sum)};
  const int64_t bad_row = first_bad_row(args.logits);
  if (bad_row < 0) run_rows(args.logits, MINIRL_PICK(minirl::token_logprobs, minirl::TokenLogprobs), args);
  return bad_row;
}

void token_logprobs_backward(MINIRL_LOGITS_PARAMETERS, Address shift, Address log_sum, Address entropy,
                             Address log_prob_grad, Address entropy_grad, MINIRL_GRADIENT_PARAMETERS) {
  const minirl::TokenLogprobsBackward args = {
      MINIRL_LOGITS,           pointer<float>(shift),         pointer<float>(log_sum),
      pointer<float>(entropy), pointer<float>(log_prob_grad), pointer<float>(entropy_grad),
      MINIRL_GRADIENT};
  run_rows(args.logits, MINIRL_PICK(minirl::token_logprobs_backward, minirl::TokenLogprobsBackward), args);
}

int64_t fused_policy_loss(MINIRL_LOGITS_PARAMETERS, Address old_log_probs, Address behaviour_log_probs,
                          Address ref_log_probs, Address advantages, Address weights, const std::string& objective,
                          bool clip, float ratio_low, float ratio_high, float threshold, float kl_coef,
                          const std::string& kl_estimator, float entropy_coef, Address log_probs, Address entropy,
                          Address token_loss, Address token_grad, MINIRL_GRADIENT_PARAMETERS) {
  using minirl::KLEstimator;
  using minirl::Objective;
  const auto kind = choice<Objective>("objective", objective,
                                      {{"minirl", Objective::kMiniRL},
                                       {"reinforce", Objective::kReinforce},
                                       {"grpo", Objective::kGrpo},
                                       {"cispo", Objective::kCispo}});
  const auto estimator = choice<KLEstimator>(
      "kl_estimator", kl_estimator, {{"k1", KLEstimator::kK1}, {"k2", KLEstimator::kK2}, {"k3", KLEstimator::kK3}});
  const minirl::FusedPolicyLoss args = {MINIRL_LOGITS,
                                        pointer<float>(old_log_probs),
                                        pointer<float>(behaviour_log_probs),
                                        pointer<float>(ref_log_probs),
                                        pointer<float>(advantages),
                                        pointer<float>(weights),
                                        {kind, clip, ratio_low, ratio_high, threshold, kl_coef, estimator},
                                        entropy_coef,
                                        pointer<float>(log_probs),
                                        pointer<float>(entropy),
                                        pointer<float>(token_loss),
                                        pointer<float>(token_grad),
                                        MINIRL_GRADIENT};
  const int64_t bad_row = first_bad_row(args.logits);
  if (bad_row < 0) run_rows(args.logits, MINIRL_PICK(minirl::fused_policy_loss, minirl::FusedPolicyLoss), args);
  return bad_row;
}

void softcap(Address logits, int64_t rows, int64_t vocab_size, int64_t stride, float cap) {
  const minirl::SoftcapLogits args = {pointer<float>(logits), vocab_size, stride, cap};
  py::gil_scoped_release no_gil;
  minirl::parallel_rows(rows, vocab_size, MINIRL_PICK(minirl::softcap, minirl::SoftcapLogits), args);
}

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

PYBIND11_MODULE(_C, module) {
  module.def("set_parallel_for", [](Address address) { minirl::g_parallel_for = (minirl::ParallelFor)address; });
  module.def("isa_built", minirl::isa_built);
  module.def("isa_supported", minirl::isa_supported);
  module.def("isa_picked", minirl::isa_name);
  module.def("set_isa", minirl::set_isa);
  module.def("advise_huge_pages", [](Address begin, int64_t bytes) { minirl::advise_huge_pages(begin, bytes); });
  module.def("release_pages", [](Address begin, int64_t bytes) { minirl::release_pages(begin, bytes); });
  module.def("attention", attention);
  module.def("attention_backward", attention_backward);
  module.def("elementwise", elementwise);
  module.def("matmul", matmul);
  module.def("matmul_grouped", matmul_grouped);
  module.def("mean", mean);
  module.def("moe_experts", moe_experts);
  module.def("pack_experts", pack_experts);
  module.def("packed_words", [](const std::string& dtype, int64_t rows, int64_t columns) {
    return minirl::packed_words(dtype_of(dtype), rows, columns);
  });
  module.def("moe_experts_backward", moe_experts_backward);
  module.def("moe_routing", moe_routing);
  module.def("moe_routing_backward", moe_routing_backward);
  module.def("rms_norm", rms_norm);
  module.def("rms_norm_backward", rms_norm_backward);
  module.def("softcap", softcap);
  module.def("softmax", softmax);
  module.def("softmax_backward", softmax_backward);
  module.def("token_logprobs", token_logprobs);
  module.def("token_logprobs_backward", token_logprobs_backward);
  module.def("fused_policy_loss", fused_policy_loss);
#ifdef MINIRL_HAVE_CUDA
  module.def("counting_sort", counting_sort);
  module.attr("most_segments") = minirl::kMostSegments;
#endif
}
