// Transcendental functions of sixteen lanes, to a few units in the last place.
#pragma once
#include "cpu/lanes.h"

#define MINIRL_METHOD inline __attribute__((always_inline))

namespace {

MINIRL_INLINE Floats negative_size(Floats x) {
  Ints bits = bits_of(x);
  MINIRL_EACH_PART bits.part[i] |= 0x80000000;
  return floats_of(bits);
}

// The smaller of x and the limit. NaN stays NaN.
MINIRL_INLINE Floats at_most(Floats x, float limit) { return splat(0.f) - max(splat(-limit), splat(0.f) - x); }

// Per lane: `then` where x < bound, else `otherwise`.
MINIRL_INLINE Floats where_less(Floats x, float bound, Floats then, Floats otherwise) {
  Ints a = bits_of(then), b = bits_of(otherwise);
  MINIRL_EACH_PART b.part[i] ^= (NativeInt)(x.part[i] < bound) & (a.part[i] ^ b.part[i]);
  return floats_of(b);
}
MINIRL_INLINE Floats where_greater(Floats x, float bound, Floats then, Floats otherwise) {
  return where_less(splat(0.f) - x, -bound, then, otherwise);
}

// e^x for x up to 88; 0 below -87.7. ln 2 is subtracted in two parts. The first part has 16 bits, so its multiples are
// exact. The polynomial's relative error is 8e-9.
MINIRL_INLINE Floats exp_precise(Floats x) {
  const Floats magic = splat(12582912.f + 127.f);  // adding it rounds, and leaves exponent + 127 in the low bits
  x = max(splat(-88.f), x);
  const Floats t = x * splat(1.44269504f) + magic, n = t - magic;
  const Floats r = x - n * splat(0.693145752f) - n * splat(1.42860677e-6f);
  Floats p = splat(1.39015338e-3f);
  p = p * r + splat(8.36373985e-3f);
  p = p * r + splat(4.16668609e-2f);
  p = p * r + splat(0.166665737f);
  p = p * r + splat(0.499999995f);
  p = splat(1.f) + (r + r * r * p);
  Ints scale = bits_of(t);
  MINIRL_EACH_PART scale.part[i] <<= 23;
  return p * floats_of(scale);
}

// log(1 + e) for e from 0 to 1: 2 artanh(s) of s = e / (2 + e), by its odd polynomial.
MINIRL_INLINE Floats log1p_of_fraction(Floats e) {
  const Floats s = e / (splat(2.f) + e), z = s * s;
  Floats p = splat(0.116197562f);
  p = p * z + splat(0.108516882f);
  p = p * z + splat(0.142962839f);
  p = p * z + splat(0.19999851f);
  p = p * z + splat(0.333333337f);
  const Floats twice = s + s;
  return twice + twice * z * p;
}

// sigmoid(x) and its complement sigmoid(-x), from e^-|x|: neither cancels, and one that is too small for a float is 0.
struct Sigmoids {
  Floats value, complement;
};
MINIRL_INLINE Sigmoids sigmoids(Floats x) {
  const Floats e = exp_precise(negative_size(x)), large = splat(1.f) / (splat(1.f) + e), small = e * large;
  return {where_less(x, 0.f, small, large), where_less(x, 0.f, large, small)};
}

// The standard normal distribution: its cumulative probability and its density.
struct Normal {
  Floats below, density;
};
// Near 0: 1/2 + x R(x^2). Elsewhere: e^(-x^2/2) t Q(t) with t = 1 / (1 + 0.35 |x|), which is accurate for probabilities
// near 0. Both polynomials are minimax, with relative errors of 4e-8 and 5e-8.
MINIRL_INLINE Normal normal(Floats x) {
  const Floats minus_size = max(splat(-14.f), negative_size(x)), z = minus_size * minus_size;
  const Floats e = exp_precise(z * splat(-0.5f)), t = splat(1.f) / (splat(1.f) - splat(0.35f) * minus_size);
  Floats q = splat(3.81234968e-2f);
  q = q * t + splat(-9.28292268e-2f);
  q = q * t + splat(2.08326286e-2f);
  q = q * t + splat(4.76241421e-2f);
  q = q * t + splat(8.32689929e-2f);
  q = q * t + splat(0.124023015f);
  q = q * t + splat(0.139429851f);
  q = q * t + splat(0.139640062f);
  const Floats tail = e * (t * q);
  Floats r = splat(9.42352425e-5f);
  r = r * z + splat(-1.1693537e-3f);
  r = r * z + splat(9.96719686e-3f);
  r = r * z + splat(-6.64895827e-2f);
  r = r * z + splat(0.398942264f);
  const Floats far = where_less(x, 0.f, tail, splat(1.f) - tail);
  return {where_less(minus_size, -1.f, far, splat(0.5f) + x * r), e * splat(0.398942280f)};
}

}  // namespace
