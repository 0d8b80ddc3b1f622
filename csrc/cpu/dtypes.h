// The element types of tensors, and the only place where code is chosen by one. Plain data: every kernel table reads
// it.
#pragma once
#include <stdint.h>

#define MINIRL_INLINE static inline __attribute__((always_inline))

namespace {

// Sixteen-bit floats are moved by integer arithmetic (lanes.h): the hardware's bf16 conversion flushes subnormals.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace

// DO(enumerator, C++ type, torch's name). A new float also needs a load and a store in lanes.h.
#define MINIRL_FOR_EACH_FLOAT(DO)           \
  DO(kFloat32, float, "torch.float32")      \
  DO(kBFloat16, BFloat16, "torch.bfloat16") \
  DO(kFloat16, Float16, "torch.float16")
#define MINIRL_FOR_EACH_INTEGER(DO)     \
  DO(kUInt8, uint8_t, "torch.uint8")    \
  DO(kInt8, int8_t, "torch.int8")       \
  DO(kUInt16, uint16_t, "torch.uint16") \
  DO(kInt16, int16_t, "torch.int16")    \
  DO(kInt32, int32_t, "torch.int32")    \
  DO(kInt64, int64_t, "torch.int64")
#define MINIRL_FOR_EACH_DTYPE(DO) MINIRL_FOR_EACH_FLOAT(DO) MINIRL_FOR_EACH_INTEGER(DO) DO(kBool, bool, "torch.bool")

namespace minirl {

#define MINIRL_ENUMERATOR(dtype, type, name) dtype,
enum class DType { MINIRL_FOR_EACH_DTYPE(MINIRL_ENUMERATOR) kOther };
#undef MINIRL_ENUMERATOR

}  // namespace minirl

namespace {

MINIRL_INLINE bool is_float(minirl::DType dtype) { return dtype <= minirl::DType::kFloat16; }
MINIRL_INLINE bool is_integer(minirl::DType dtype) {
  return dtype >= minirl::DType::kUInt8 && dtype <= minirl::DType::kInt64;
}

// body(pointer to the type of `dtype`), where `dtype` is a float; the pointer itself is null.
#define MINIRL_CASE(dtype, type, name) \
  case minirl::DType::dtype:           \
    return body((type*)nullptr);
template <class Body>
MINIRL_INLINE void with_float(minirl::DType dtype, const Body& body) {
  switch (dtype) {
    MINIRL_FOR_EACH_FLOAT(MINIRL_CASE)
    default:
      return;
  }
}
#undef MINIRL_CASE

// The same for two floats, of which `wide` is equal to `narrow` or float32.
template <class Body>
MINIRL_INLINE void with_floats(minirl::DType narrow, minirl::DType wide, const Body& body) {
  with_float(narrow, [&](auto* type) __attribute__((always_inline)) {
    if (narrow == wide) return body(type, type);
    if constexpr (sizeof(*type) < sizeof(float)) body(type, (float*)nullptr);
  });
}

// data[place], where `dtype` is an integer.
#define MINIRL_CASE(dtype, type, name) \
  case minirl::DType::dtype:           \
    return (int64_t)((const type*)data)[place];
MINIRL_INLINE int64_t integer_at(const void* data, minirl::DType dtype, int64_t place) {
  switch (dtype) {
    MINIRL_FOR_EACH_INTEGER(MINIRL_CASE)
    default:
      return -1;
  }
}
#undef MINIRL_CASE

#define MINIRL_CASE(dtype, type, name) \
  case minirl::DType::dtype:           \
    return sizeof(type);
MINIRL_INLINE int64_t bytes_of(minirl::DType dtype) {
  switch (dtype) {
    MINIRL_FOR_EACH_DTYPE(MINIRL_CASE)
    default:
      return 0;
  }
}
#undef MINIRL_CASE

}  // namespace
