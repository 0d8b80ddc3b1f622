// From the dtypes of a call to the types of its rows.
#pragma once
#include "cpu/lanes.h"
#include "cpu/logits.h"

namespace {

// body(pointer to the type of `dtype`); the pointer itself is null.
template <class Body>
MINIRL_INLINE void with_type(minirl::DType dtype, const Body& body) {
  switch (dtype) {
    case minirl::DType::kFloat32:
      return body((float*)nullptr);
    case minirl::DType::kBFloat16:
      return body((BFloat16*)nullptr);
    case minirl::DType::kFloat16:
      return body((Float16*)nullptr);
  }
}

// The same for two types, of which `wide` is that of `narrow` or float32.
template <class Body>
MINIRL_INLINE void with_types(minirl::DType narrow, minirl::DType wide, const Body& body) {
  with_type(narrow, [&](auto* type) __attribute__((always_inline)) {
    if (narrow == wide) return body(type, type);
    if constexpr (sizeof(*type) < sizeof(float)) body(type, (float*)nullptr);
  });
}

}  // namespace
