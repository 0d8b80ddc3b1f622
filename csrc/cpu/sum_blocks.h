// How sums.h cuts a sum. Plain data: every kernel table reads it.
#pragma once
#include <stdint.h>

namespace minirl {

constexpr int64_t kSumBlock = 4096;  // terms
constexpr int64_t kStrip = 64;       // columns, summed side by side

static inline int64_t sum_blocks(int64_t terms) { return terms <= kSumBlock ? 1 : (terms + kSumBlock - 1) / kSumBlock; }
static inline int64_t strips(int64_t columns) { return (columns + kStrip - 1) / kStrip; }

}  // namespace minirl
