// A kernel's walk over rows of logits of any of the three dtypes.
#pragma once
#include "cpu/lanes.h"
#include "cpu/logits.h"

namespace {

template <class T, class Body>
MINIRL_INLINE void for_each_row_of(const minirl::Logits& logits, int64_t begin, int64_t end, const Body& body) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = minirl::row_offset(row, logits.length, logits.batch_stride, logits.length_stride);
    body(row, (T*)logits.data + offset, minirl::id_of_row(logits, row), logits.temperature[row]);
  }
}

// body(row, pointer to its first logit, token id, temperature)
template <class Body>
MINIRL_INLINE void for_each_row(const minirl::Logits& logits, int64_t begin, int64_t end, const Body& body) {
  switch (logits.dtype) {
    case minirl::DType::kFloat32:
      return for_each_row_of<float>(logits, begin, end, body);
    case minirl::DType::kBFloat16:
      return for_each_row_of<BFloat16>(logits, begin, end, body);
    case minirl::DType::kFloat16:
      return for_each_row_of<Float16>(logits, begin, end, body);
  }
}

// body(row, pointer to its first logit, to the gradient of that, token id, temperature)
template <class Body>
MINIRL_INLINE void for_each_gradient_row(const minirl::Logits& logits, const minirl::Gradient& out, int64_t begin,
                                         int64_t end, const Body& body) {
  for_each_row(logits, begin, end, [&](int64_t row, auto* x, int64_t id, float temperature) {
    const int64_t offset = minirl::row_offset(row, logits.length, out.batch_stride, out.length_stride);
    if (out.dtype == logits.dtype) return body(row, x, (decltype(x))out.data + offset, id, temperature);
    if constexpr (sizeof(*x) == sizeof(float)) {
      if (out.dtype == minirl::DType::kBFloat16) return body(row, x, (BFloat16*)out.data + offset, id, temperature);
      return body(row, x, (Float16*)out.data + offset, id, temperature);
    }
  });
}

}  // namespace
