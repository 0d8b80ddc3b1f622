// Rows of floats, contiguous along a row, that lie apart by up to two strides. Plain data: every kernel table reads it.
#pragma once
#include "cpu/dtypes.h"

namespace minirl {

struct StridedRows {
  void* data;
  DType dtype;
  int64_t count, size;                          // how many rows, and elements of each
  int64_t length, batch_stride, length_stride;  // row r is at [r / length, r % length]; strides in elements
};

static inline int64_t row_offset(const StridedRows& rows, int64_t row) {
  return row / rows.length * rows.batch_stride + row % rows.length * rows.length_stride;
}

// `type` says only which of the dtypes it is.
template <class T>
static inline T* row_of(const T* type, const StridedRows& rows, int64_t row) {
  (void)type;
  return (T*)rows.data + row_offset(rows, row);
}

}  // namespace minirl
