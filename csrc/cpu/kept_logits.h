#pragma once
#include "cpu/dispatch.h"
#include "cpu/logits.h"

namespace minirl {

// Rows [batch, length] of logits, of which the ids [begin, end) stay; a row that has none stays whole.
struct KeptLogits {
  void* data;
  DType dtype;
  int64_t batch, length, vocab_size;
  int64_t batch_stride, length_stride;  // in elements; the vocabulary is contiguous
  const int32_t* ids;          // ascending within a row; those of other shards of the vocabulary are out of range
  const int32_t *begin, *end;  // one per row, places in ids
};

MINIRL_DECLARE_KERNEL(kept_logits, KeptLogits)

}  // namespace minirl
