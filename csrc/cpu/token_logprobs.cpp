// Log-probability and entropy of each row's token, and the gradient of the logits.
#include "cpu/token_logprobs.h"

#include "cpu/logit_rows.h"
#include "cpu/rows.h"

namespace minirl {

void MINIRL_KERNEL(token_logprobs)(const TokenLogprobs& args, int64_t begin, int64_t end) {
  for_each_row(args.logits, begin, end, [&](int64_t row, auto* x, int64_t id, float temperature) {
    RowSums sums = {};
    TokenStats stats = {};
    if (id != kIgnoreIndex) {
      ForgetExponentials forget;
      sums = row_sums(x, args.logits.rows.size, kLog2E / temperature, forget);
      stats = token_stats(sums, load_one(x + id), temperature);
    }
    args.log_probs[row] = stats.log_prob;
    if (args.entropy) args.entropy[row] = stats.entropy;
    args.shift[row] = sums.shift;
    args.log_sum[row] = stats.log_sum;
  });
}

void MINIRL_KERNEL(token_logprobs_backward)(const TokenLogprobsBackward& args, int64_t begin, int64_t end) {
  for_each_gradient_row(args.logits, args.out, begin, end,
                        [&](int64_t row, auto* x, auto* out, int64_t id, float temperature) {
                          const bool counts = id != kIgnoreIndex;
                          const TokenStats stats = {0.f, args.entropy ? args.entropy[row] : 0.f, args.log_sum[row]};
                          write_row(x, out, args.logits.rows.size, id, temperature, args.shift[row], stats,
                                    counts ? args.log_prob_grad[row] : 0.f,
                                    counts && args.entropy_grad ? args.entropy_grad[row] : 0.f, args.out.softcap);
                        });
}

}  // namespace minirl
