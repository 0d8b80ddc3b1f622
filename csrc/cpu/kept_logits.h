#pragma once
#include "cpu/dispatch.h"
#include "cpu/strided_rows.h"

namespace minirl {

// Rows of logits, of which the ids [begin, end) stay; a row that has none stays whole.
struct KeptLogits {
  StridedRows logits;
  const int32_t* ids;          // ascending within a row; those of other shards of the vocabulary are out of range
  const int32_t *begin, *end;  // one per row, places in ids
};

MINIRL_DECLARE_KERNEL(kept_logits, KeptLogits)

}  // namespace minirl
