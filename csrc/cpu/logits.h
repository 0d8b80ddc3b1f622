// Rows of logits, the ids that they score, and where their gradient goes. Plain data: every kernel table reads it.
#pragma once
#include "cpu/strided_rows.h"

namespace minirl {

constexpr int64_t kIgnoreIndex = -100;
constexpr int64_t kElsewhere = -1;  // the token counts, and its id is in another shard of the vocabulary

struct Logits {
  StridedRows rows;  // a row is as long as the vocabulary
  const void* ids;   // one per row
  DType ids_dtype;
  const float* temperature;  // one per row
};

struct Gradient {
  StridedRows rows;  // of the logits' dtype, or 16-bit in place of float32; the logits themselves are used as scratch
  float softcap;     // the gradient is by u where the logits are softcap tanh(u / softcap); 0 where they are u itself
};

static inline int64_t id_of_row(const Logits& logits, int64_t row) {
  return integer_at(logits.ids, logits.ids_dtype, row);
}

}  // namespace minirl
