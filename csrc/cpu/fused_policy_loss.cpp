// Logits to loss and gradient in one sweep: a row is read from memory once, and its gradient is written once while the
// row is still in the cache.
#include "cpu/fused_policy_loss.h"

#include <stdlib.h>

#include "cpu/logit_rows.h"
#include "cpu/rows.h"

namespace minirl {

static ObjectiveToken token_of_row(const FusedPolicyLoss& args, int64_t row, float log_prob) {
  const float old = args.old_log_probs ? args.old_log_probs[row] : log_prob;
  const float behaviour = args.behaviour_log_probs ? args.behaviour_log_probs[row] : old;
  const float ref = args.ref_log_probs ? args.ref_log_probs[row] : 0.f;
  return {log_prob, old, behaviour, ref, args.advantages[row]};
}

// A token's share of the loss, and c_t, the derivative of it by the log-probability. Both are NaN where float32 cannot
// hold one of them.
struct TokenShare {
  float loss, grad;
};
static TokenShare weighted_objective(const FusedPolicyLoss& args, int64_t row, float log_prob) {
  const TokenLoss result = token_objective(args.config, token_of_row(args, row, log_prob));
  const TokenShare share = {(float)(args.weights[row] * result.loss), (float)(args.weights[row] * result.grad)};
  return fabsf(share.loss) < INFINITY && fabsf(share.grad) < INFINITY ? share : TokenShare{NAN, NAN};
}

// The memory for the exponentials of a row: a float32 gradient itself, or float32 logits that a 16-bit gradient will
// overwrite, or the buffer for 16-bit logits. `buffer` begins with the shift of each tile.
static KeepExponentials place_to_keep(float* buffer, float*, float* out, int64_t) { return {out, buffer}; }
template <class U>
static KeepExponentials place_to_keep(float* buffer, float* x, U*, int64_t) {
  return {x, buffer};
}
template <class T>
static KeepExponentials place_to_keep(float* buffer, T*, T*, int64_t tiles) {
  return {buffer + tiles, buffer};
}

void MINIRL_KERNEL(fused_policy_loss)(const FusedPolicyLoss& args, int64_t begin, int64_t end) {
  const int64_t vocab_size = args.logits.rows.size, tiles = tiles_of(vocab_size);
  const bool wide = args.logits.rows.dtype == DType::kFloat32;
  // The gradients of an entropy and of a softcap need the exponent y (rows.h) beside 2^y, so they read the logits
  // again. So do all gradients if the buffer cannot be allocated.
  const bool walks_twice = args.entropy_coef != 0.f || args.out.softcap != 0.f;
  float* buffer = walks_twice ? nullptr : (float*)malloc((tiles + (wide ? 0 : vocab_size)) * sizeof(float));
  for_each_gradient_row(
      args.logits, args.out, begin, end, [&](int64_t row, auto* x, auto* out, int64_t id, float temperature) {
        TokenStats stats = {};
        TokenShare share = {};
        if (id == kIgnoreIndex) {
          memset((void*)out, 0, vocab_size * sizeof(*out));
        } else {
          const float logit = load_one(x + id), c = kLog2E / temperature;
          if (buffer) {
            KeepExponentials keep = place_to_keep(buffer, x, out, tiles);
            const RowSums sums = row_sums(x, vocab_size, c, keep);
            stats = token_stats(sums, logit, temperature);
            share = weighted_objective(args, row, stats.log_prob);
            write_kept_row(keep, out, vocab_size, id, temperature, sums.shift, stats, logit, share.grad);
          } else {
            ForgetExponentials forget;
            const RowSums sums = row_sums(x, vocab_size, c, forget);
            stats = token_stats(sums, logit, temperature);
            share = weighted_objective(args, row, stats.log_prob);
            write_row(x, out, vocab_size, id, temperature, sums.shift, stats, share.grad,
                      -args.entropy_coef * args.weights[row], args.out.softcap);
          }
        }
        args.log_probs[row] = stats.log_prob;
        args.entropy[row] = stats.entropy;
        args.token_loss[row] = share.loss;
        args.token_grad[row] = share.grad;
      });
  free(buffer);
}

void MINIRL_KERNEL(fused_policy_loss_overflow)(const FusedPolicyLoss& args, int64_t begin, int64_t end) {
  const int64_t n = args.logits.rows.size;
  for_each_row(args.logits, begin, end, [&](int64_t row, const auto* x, int64_t id, float temperature) {
    TokenStats stats = {};
    TokenShare share = {};
    if (id != kIgnoreIndex) {
      const float logit = load_one(x + id);
      double lowest = -INFINITY;  // a lower bound of the log-probability, with 1 as a margin for rounding
      if (needs_lowest(args.config)) {
        float largest = -INFINITY;
        for (int64_t j = 0; j < n; j += kTile) largest = fmaxf(largest, tile_max(x + j, n - j < kTile ? n - j : kTile));
        lowest = ((double)logit - largest) / temperature - log((double)n) - 1;
      }
      if (!always_fits(args.config, token_of_row(args, row, 0.f), args.weights[row], lowest)) {
        ForgetExponentials forget;
        stats = token_stats(row_sums(x, n, kLog2E / temperature, forget), logit, temperature);
        share = weighted_objective(args, row, stats.log_prob);
      }
    }
    args.log_probs[row] = stats.log_prob;
    args.token_loss[row] = share.loss;
    args.token_grad[row] = share.grad;
  });
}

}  // namespace minirl
