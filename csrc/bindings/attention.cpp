// Attention.
#include "attention.h"
#include "bindings/binding.h"

namespace py = pybind11;
using minirl::Data;
using minirl::OptionalData;
using minirl::OptionalTensor;
using minirl::Tensor;

namespace {

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

const minirl::Binding attention_binding([](py::module_& module) {
  module.def("attention", attention);
  module.def("attention_backward", attention_backward);
});

}  // namespace
