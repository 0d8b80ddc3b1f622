// Rows of logits, the ids that they score, and where their gradient goes. Plain data: every kernel table reads it.
#pragma once
#include <stdint.h>

namespace minirl {

enum class DType { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t kIgnoreIndex = -100;
constexpr int64_t kElsewhere = -1;  // the id counts, and is in another shard of the vocabulary

struct Logits {
  void* data;
  DType dtype;
  int64_t batch, length, vocab_size;    // rows are [batch, length]
  int64_t batch_stride, length_stride;  // in elements; the vocabulary is contiguous
  const void* ids;
  bool wide_ids;             // int64, else int32
  const float* temperature;  // one per row
};

struct Gradient {
  void* data;   // possibly the logits themselves: such logits are used as scratch
  DType dtype;  // that of the logits, or a 16-bit one in place of float32 logits
  int64_t batch_stride, length_stride;
  float softcap;  // the gradient is by u where the logits are softcap tanh(u / softcap); 0 where they are u itself
};

static inline int64_t row_offset(int64_t row, int64_t length, int64_t batch_stride, int64_t length_stride) {
  return row / length * batch_stride + row % length * length_stride;
}
static inline int64_t id_of_row(const Logits& logits, int64_t row) {
  return logits.wide_ids ? ((const int64_t*)logits.ids)[row] : ((const int32_t*)logits.ids)[row];
}

}  // namespace minirl
