// Logits to loss and gradient in one sweep: a row is read once from memory, and its gradient written once while
// the row is still in the cache.
#include "cpu/fused_policy_loss.h"

#include <stdlib.h>

#include "cpu/logit_rows.h"
#include "cpu/rows.h"

namespace minirl {

static TokenLoss weighted_objective(const FusedPolicyLoss& args, int64_t row, float log_prob) {
  const float old = args.old_log_probs ? args.old_log_probs[row] : log_prob;
  const float behaviour = args.behaviour_log_probs ? args.behaviour_log_probs[row] : old;
  const float ref = args.ref_log_probs ? args.ref_log_probs[row] : 0.f;
  const TokenLoss result = token_objective(args.config, {log_prob, old, behaviour, ref, args.advantages[row]});
  return {args.weights[row] * result.loss, args.weights[row] * result.grad};
}

// Where the exponentials of a row are kept: a float32 gradient is their place itself, a 16-bit one needs a buffer.
static KeepExponentials place_to_keep(float* buffer, float* out, int64_t) { return {out, buffer}; }
template <class T>
static KeepExponentials place_to_keep(float* buffer, T*, int64_t tiles) {
  return {buffer + tiles, buffer};
}

void MINIRL_KERNEL(fused_policy_loss)(const FusedPolicyLoss& args, int64_t begin, int64_t end) {
  const int64_t vocab_size = args.logits.vocab_size, tiles = tiles_of(vocab_size);
  const bool wide = args.logits.dtype == DType::kFloat32;
  // the entropy's gradient needs y beside 2^y, so it walks the logits again, as do all where memory is short
  float* buffer =
      args.entropy_coef != 0.f ? nullptr : (float*)malloc((tiles + (wide ? 0 : vocab_size)) * sizeof(float));
  for_each_row(args.logits, begin, end, [&](int64_t row, auto* x, int64_t id, float temperature) {
    auto* out = gradient_row(args.out, args.logits, row, x);
    TokenStats stats = {};
    TokenLoss loss = {};
    if (id == kIgnoreIndex) {
      memset((void*)out, 0, vocab_size * sizeof(*out));
    } else {
      const float logit = load_one(x + id), c = kLog2E / temperature;
      if (buffer) {
        KeepExponentials keep = place_to_keep(buffer, out, tiles);
        const RowSums sums = row_sums(x, vocab_size, c, keep);
        stats = token_stats(sums, logit, temperature);
        loss = weighted_objective(args, row, stats.log_prob);
        write_kept_row(keep, out, vocab_size, id, temperature, sums.shift, stats, logit, loss.grad);
      } else {
        ForgetExponentials forget;
        const RowSums sums = row_sums(x, vocab_size, c, forget);
        stats = token_stats(sums, logit, temperature);
        loss = weighted_objective(args, row, stats.log_prob);
        write_row(x, out, vocab_size, id, temperature, sums.shift, stats, loss.grad,
                  -args.entropy_coef * args.weights[row]);
      }
    }
    args.log_probs[row] = stats.log_prob;
    args.entropy[row] = stats.entropy;
    args.token_loss[row] = loss.loss;
    args.token_grad[row] = loss.grad;
  });
  free(buffer);
}

}  // namespace minirl
