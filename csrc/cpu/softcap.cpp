// Logits bounded by a hyperbolic tangent, in place.
#include "cpu/softcap.h"

#include "cpu/lanes.h"

namespace minirl {
namespace {

// Below 0.64 an odd polynomial of least squares (relative error 6e-9), above it 1 - 2 / (e^2|u| + 1).
MINIRL_INLINE Floats tanh_lanes(Floats u) {
  const Floats z = u * u;
  Floats p = splat(-5.59025e-3f);
  p = p * z + splat(2.053771e-2f);
  p = p * z + splat(-5.37091e-2f);
  p = p * z + splat(0.13331081f);
  p = p * z + splat(-0.33333269f);
  const Floats small = u + u * z * p;
  Ints sign = bits_of(u), magnitude = sign;
  MINIRL_EACH_PART sign.part[i] &= 0x80000000, magnitude.part[i] &= 0x7fffffff;
  const Floats size = floats_of(magnitude);
  Floats minus_two_u = size * splat(-2.88539008f);  // in powers of two
  Floats e = exp2_lanes(bounded_exponent(minus_two_u)), large;
  MINIRL_EACH_PART large.part[i] = (1.f - e.part[i]) / (1.f + e.part[i]);
  Ints chosen = bits_of(large);
  MINIRL_EACH_PART {
    const NativeInt is_small = (NativeInt)(size.part[i] < 0.64f);
    chosen.part[i] = (is_small & bits_of(small).part[i]) | (~is_small & (chosen.part[i] | sign.part[i]));
  }
  return floats_of(chosen);
}

}  // namespace

void MINIRL_KERNEL(softcap)(const SoftcapLogits& args, int64_t begin, int64_t end) {
  const Floats cap = splat(args.cap), reciprocal = splat(1.f / args.cap);
  const int64_t size = args.logits.size;
  for (int64_t row = begin; row < end; ++row) {
    float* x = row_of((const float*)nullptr, args.logits, row);
    int64_t j = 0;
    for (; j + kLanes <= size; j += kLanes) store(x + j, cap * tanh_lanes(load(x + j) * reciprocal));
    if (j < size) {
      const int64_t rest = size - j;
      store_part(x + j, cap * tanh_lanes(load_part(x + j, rest) * reciprocal), rest);
    }
  }
}

}  // namespace minirl
