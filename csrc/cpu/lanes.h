// Sixteen float lanes. Most of what depends on the instruction set is here.
//
// Every table computes with the same sixteen virtual lanes, built of vectors of its own width, and without fused
// multiply-adds, so that all tables give the same bits. Everything here has internal linkage, since one function
// compiled for two instruction sets must not become one symbol.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __x86_64__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "cpu/dtypes.h"

namespace {

#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kLanes = 16;
constexpr int kParts = kLanes / kNative;

typedef float NativeFloat __attribute__((vector_size(4 * kNative)));
typedef uint32_t NativeInt __attribute__((vector_size(4 * kNative)));
typedef uint16_t NativeHalf __attribute__((vector_size(2 * kNative)));

struct Floats {
  NativeFloat part[kParts];
};
struct Ints {
  NativeInt part[kParts];
};

#define MINIRL_EACH_PART for (int i = 0; i < kParts; ++i)

MINIRL_INLINE Floats splat(float x) {
  Floats r;
  MINIRL_EACH_PART r.part[i] = NativeFloat{} + x;
  return r;
}
MINIRL_INLINE Floats operator+(Floats a, Floats b) {
  MINIRL_EACH_PART a.part[i] += b.part[i];
  return a;
}
MINIRL_INLINE Floats operator-(Floats a, Floats b) {
  MINIRL_EACH_PART a.part[i] -= b.part[i];
  return a;
}
MINIRL_INLINE Floats operator*(Floats a, Floats b) {
  MINIRL_EACH_PART a.part[i] *= b.part[i];
  return a;
}
MINIRL_INLINE Floats operator/(Floats a, Floats b) {
  MINIRL_EACH_PART a.part[i] /= b.part[i];
  return a;
}
// The larger of each lane; a NaN in `b` stays. GCC does not find the instruction for this comparison.
MINIRL_INLINE Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  MINIRL_EACH_PART b.part[i] = (NativeFloat)_mm512_max_ps((__m512)a.part[i], (__m512)b.part[i]);
#elif defined(__AVX2__)
  MINIRL_EACH_PART b.part[i] = (NativeFloat)_mm256_max_ps((__m256)a.part[i], (__m256)b.part[i]);
#elif defined(__SSE2__)
  MINIRL_EACH_PART b.part[i] = (NativeFloat)_mm_max_ps((__m128)a.part[i], (__m128)b.part[i]);
#else
  MINIRL_EACH_PART b.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
#endif
  return b;
}
MINIRL_INLINE Ints bits_of(Floats a) {
  Ints r;
  MINIRL_EACH_PART r.part[i] = (NativeInt)a.part[i];
  return r;
}
MINIRL_INLINE Floats floats_of(Ints a) {
  Floats r;
  MINIRL_EACH_PART r.part[i] = (NativeFloat)a.part[i];
  return r;
}

// One vector at a time: a single copy of sixteen lanes would go through the stack in pieces of another size.
MINIRL_INLINE Floats load(const float* p) {
  Floats r;
  MINIRL_EACH_PART memcpy(&r.part[i], p + i * kNative, sizeof r.part[i]);
  return r;
}
MINIRL_INLINE void store(float* p, Floats v) { MINIRL_EACH_PART memcpy(p + i * kNative, &v.part[i], sizeof v.part[i]); }

// The sum of the lanes, by halves, in one order for every table.
MINIRL_INLINE float sum_lanes(Floats v) {
  float a[kLanes];
  store(a, v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
}
MINIRL_INLINE float max_lanes(Floats v) {
  float a[kLanes];
  store(a, v);
  float m = a[0];
  for (int i = 1; i < kLanes; ++i) m = a[i] > m ? a[i] : m;
  return m;
}

// The argument of exp2_lanes: at least -127. NaN stays NaN.
MINIRL_INLINE Floats bounded_exponent(Floats y) { return max(splat(-127.f), y); }

// 2^y for y from -127 to 127; exactly 0 below -126.5, so that a logit of -inf has probability 0. The polynomial is
// minimax of degree 5 on [-1/2, 1/2] through (0, 1): relative error 1.9e-7, in the mean square 6.7e-8.
MINIRL_INLINE Floats exp2_lanes(Floats y) {
  const Floats magic = splat(12582912.f + 127.f);  // adding it rounds, and leaves exponent + 127 in the low bits
  Floats t = y + magic;
  Floats f = y - (t - magic);
  Floats p = splat(1.326472615e-3f);
  p = p * f + splat(9.671512991e-3f);
  p = p * f + splat(5.550733581e-2f);
  p = p * f + splat(2.402224243e-1f);
  p = p * f + splat(6.931470037e-1f);
  p = p * f + splat(1.f);
  Ints scale = bits_of(t);
  MINIRL_EACH_PART scale.part[i] <<= 23;
  return p * floats_of(scale);
}

// e^x for x up to 88
MINIRL_INLINE Floats exp_lanes(Floats x) { return exp2_lanes(bounded_exponent(x * splat(1.44269504f))); }

MINIRL_INLINE float exp2_one(float y) {
  Floats r = exp2_lanes(bounded_exponent(splat(y)));
  return r.part[0][0];
}

MINIRL_INLINE Ints load_halves(const void* p) {
  Ints r;
  MINIRL_EACH_PART {
    NativeHalf h;
    memcpy(&h, (const uint16_t*)p + i * kNative, sizeof h);
#if defined(__AVX512F__)
    r.part[i] = (NativeInt)_mm512_cvtepu16_epi32((__m256i)h);  // GCC would widen it in two pieces
#else
    r.part[i] = __builtin_convertvector(h, NativeInt);
#endif
  }
  return r;
}
MINIRL_INLINE void store_halves(void* p, Ints v) {
  MINIRL_EACH_PART {
#if defined(__AVX512F__)
    NativeHalf h = (NativeHalf)_mm512_cvtepi32_epi16((__m512i)v.part[i]);
#else
    NativeHalf h = __builtin_convertvector(v.part[i], NativeHalf);
#endif
    memcpy((uint16_t*)p + i * kNative, &h, sizeof h);
  }
}

MINIRL_INLINE Floats load(const BFloat16* p) {
  Ints w = load_halves(p);
  MINIRL_EACH_PART w.part[i] <<= 16;
  return floats_of(w);
}
// Rounds to nearest, ties to even. A NaN made by arithmetic or widened from 16 bits stays NaN.
MINIRL_INLINE void store(BFloat16* p, Floats v) {
  Ints w = bits_of(v);
  MINIRL_EACH_PART w.part[i] = (w.part[i] + 0x7fff + (w.part[i] >> 16 & 1)) >> 16;
  store_halves(p, w);
}

MINIRL_INLINE Floats load(const Float16* p) {
  Ints h = load_halves(p), magnitude;
  MINIRL_EACH_PART magnitude.part[i] = (h.part[i] & 0x7fff) << 13;
  // the power of two shifts the exponent's bias and makes subnormals normal
  Ints w = bits_of(floats_of(magnitude) * splat(0x1p112f));
  MINIRL_EACH_PART {
    NativeInt special = (NativeInt)(magnitude.part[i] >= 0x0f800000) & 0x7f800000;  // inf and NaN
    w.part[i] |= special | (h.part[i] & 0x8000) << 16;
  }
  return floats_of(w);
}
// Rounds to nearest, ties to even, with subnormals and infinities.
MINIRL_INLINE void store(Float16* p, Floats v) {
  Ints w = bits_of(v), magnitude;
  MINIRL_EACH_PART magnitude.part[i] = w.part[i] & 0x7fffffff;
  // 0.5 has the ulp of the smallest half, so adding it rounds a subnormal
  Ints subnormal = bits_of(floats_of(magnitude) + splat(0.5f));
  MINIRL_EACH_PART {
    NativeInt a = magnitude.part[i];
    NativeInt normal = (a + 0xc8000fff + (a >> 13 & 1)) >> 13;
    NativeInt is_small = (NativeInt)(a < 0x38800000), is_large = (NativeInt)(a >= 0x47800000);
    NativeInt is_nan = (NativeInt)(a > 0x7f800000);
    NativeInt h = (is_small & (subnormal.part[i] - 0x3f000000)) | (~is_small & normal);
    h = (is_large & (0x7c00 | (is_nan & 0x200))) | (~is_large & h);
    w.part[i] = h | (w.part[i] >> 16 & 0x8000);
  }
  store_halves(p, w);
}

// The first `n` lanes; the others are -inf, whose probability is 0.
template <class T>
MINIRL_INLINE Floats load_part(const T* p, int64_t n) {
  T padded[kLanes] = {};
  memcpy(padded, p, n * sizeof(T));
  Floats v = load(padded);
  float a[kLanes];
  store(a, v);
  for (int64_t i = n; i < kLanes; ++i) a[i] = -INFINITY;
  return load(a);
}
template <class T>
MINIRL_INLINE void store_part(T* p, Floats v, int64_t n) {
  T padded[kLanes];
  store(padded, v);
  memcpy(p, padded, n * sizeof(T));
}
// At most all lanes.
template <class T>
MINIRL_INLINE Floats load_first(const T* p, int64_t n) {
  return n < kLanes ? load_part(p, n) : load(p);
}
template <class T>
MINIRL_INLINE void store_first(T* p, Floats v, int64_t n) {
  if (n < kLanes)
    store_part(p, v, n);
  else
    store(p, v);
}
template <class T>
MINIRL_INLINE float load_one(const T* p) {
  return load_part(p, 1).part[0][0];
}
template <class T>
MINIRL_INLINE void store_one(T* p, float x) {
  store_part(p, splat(x), 1);
}

}  // namespace
