// A kernel's walk over rows of logits of any float dtype.
#pragma once
#include "cpu/lanes.h"
#include "cpu/logits.h"

namespace {

// body(row, pointer to its first logit, token id, temperature)
template <class Body>
MINIRL_INLINE void for_each_row(const minirl::Logits& logits, int64_t begin, int64_t end, const Body& body) {
  with_float(logits.rows.dtype, [&](auto* type) __attribute__((always_inline)) {
    for (int64_t row = begin; row < end; ++row)
      body(row, minirl::row_of(type, logits.rows, row), minirl::id_of_row(logits, row), logits.temperature[row]);
  });
}

// body(row, pointer to its first logit, pointer to the gradient of that logit, token id, temperature)
template <class Body>
MINIRL_INLINE void for_each_gradient_row(const minirl::Logits& logits, const minirl::Gradient& out, int64_t begin,
                                         int64_t end, const Body& body) {
  with_floats(out.rows.dtype, logits.rows.dtype, [&](auto* out_type, auto* type) __attribute__((always_inline)) {
    for (int64_t row = begin; row < end; ++row)
      body(row, minirl::row_of(type, logits.rows, row), minirl::row_of(out_type, out.rows, row),
           minirl::id_of_row(logits, row), logits.temperature[row]);
  });
}

}  // namespace
