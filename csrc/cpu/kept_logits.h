#pragma once
#include "cpu/dispatch.h"
#include "cpu/strided_rows.h"

namespace minirl {

// Rows of logits. A row keeps the logits of ids[begin .. end), or all of them where that range is empty.
struct KeptLogits {
  StridedRows logits;
  const int32_t* ids;          // ascending within a row; ids in other shards of the vocabulary are out of range
  const int32_t *begin, *end;  // one per row: places in `ids`
};

MINIRL_DECLARE_KERNEL(kept_logits, KeptLogits)

}  // namespace minirl
