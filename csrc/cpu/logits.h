// Rows of logits, the ids that they score, and where their gradient goes. Plain data: every kernel table reads it.
#pragma once
#include <stdint.h>

namespace minirl {

enum class DType { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t kIgnoreIndex = -100;

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
  void* data;  // of the dtype of the logits, and possibly the logits themselves
  int64_t batch_stride, length_stride;
};

static inline int64_t row_offset(int64_t row, int64_t length, int64_t batch_stride, int64_t length_stride) {
  return row / length * batch_stride + row % length * length_stride;
}
static inline int64_t id_of_row(const Logits& logits, int64_t row) {
  return logits.wide_ids ? ((const int64_t*)logits.ids)[row] : ((const int32_t*)logits.ids)[row];
}

}  // namespace minirl
