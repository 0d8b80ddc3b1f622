// Rows of logits, as the bindings of several ops take them.
#pragma once
#include "bindings/binding.h"
#include "cpu/logits.h"
#include "parallel.h"

namespace minirl {

inline Logits logits_of(const Tensor& logits, const Tensor& ids, const float* temperature) {
  return {rows_of(logits), ids.data, ids.integer_dtype(), temperature};
}

// First row whose id is neither in the vocabulary nor ignored, or -1. Checked before anything is written.
inline int64_t first_bad_row(const Logits& logits) {
  for (int64_t row = 0; row < logits.rows.count; ++row) {
    const int64_t id = id_of_row(logits, row);
    if (id != kIgnoreIndex && (id < 0 || id >= logits.rows.size)) return row;
  }
  return -1;
}

template <class Args>
void run_rows(const StridedRows& rows, Kernel<Args> kernel, const Args& args) {
  pybind11::gil_scoped_release no_gil;
  parallel_rows(rows.count, rows.size, kernel, args);
}

}  // namespace minirl
