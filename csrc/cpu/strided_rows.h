// Rows of floats of any of the three dtypes, apart by up to two strides. Plain data: every kernel table reads it.
#pragma once
#include <stdint.h>

#include "cpu/logits.h"

namespace minirl {

struct StridedRows {
  void* data;
  DType dtype;
  int64_t length, batch_stride, length_stride;  // rows are [batch, length]; strides in elements
};

static inline StridedRows contiguous_rows(void* data, DType dtype, int64_t size) { return {data, dtype, 1, size, 0}; }

// `type` says only which of the dtypes it is
template <class T>
static inline T* row_of(const T* type, const StridedRows& rows, int64_t row) {
  (void)type;
  return (T*)rows.data + row_offset(row, rows.length, rows.batch_stride, rows.length_stride);
}

}  // namespace minirl
