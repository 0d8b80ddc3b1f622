// Functions of one element and their slopes. All elements, the last ones too, go through the same sixteen lanes.
#include "cpu/elementwise.h"

#include "cpu/functions.h"

namespace minirl {
namespace {

struct Sigmoid {
  MINIRL_METHOD Floats value(Floats x) const { return sigmoids(x).value; }
  MINIRL_METHOD Floats slope(Floats x) const {
    const Sigmoids s = sigmoids(x);
    return s.value * s.complement;
  }
};

struct Silu {
  MINIRL_METHOD Floats value(Floats x) const { return x * sigmoids(x).value; }
  MINIRL_METHOD Floats slope(Floats x) const {
    const Sigmoids s = sigmoids(x);
    return s.value * (splat(1.f) + x * s.complement);
  }
};

// log(1 + e^y) / beta with y = beta x; x where y is above the threshold.
struct Softplus {
  float beta, threshold;
  MINIRL_METHOD Floats value(Floats x) const {
    const Floats y = x * splat(beta);
    const Floats sum = max(splat(0.f), y) + log1p_of_fraction(exp_precise(negative_size(y)));
    return where_greater(y, threshold, x, sum / splat(beta));
  }
  MINIRL_METHOD Floats slope(Floats x) const {
    const Floats y = x * splat(beta);
    return where_greater(y, threshold, splat(1.f), sigmoids(y).value);
  }
};

struct Gelu {
  MINIRL_METHOD Floats value(Floats x) const { return x * normal(x).below; }
  MINIRL_METHOD Floats slope(Floats x) const {
    const Normal n = normal(x);
    return n.below + x * n.density;
  }
};

// x (1 + tanh u) / 2 = x sigmoid(v) with v = 2u = x (c + 0.044715 c x^2), c = 2 sqrt(2 / pi).
struct GeluTanh {
  MINIRL_METHOD Floats value(Floats x) const {
    const Floats y = bounded(x);
    return x * sigmoids(y * (splat(1.59576912f) + splat(0.0713548163f) * (y * y))).value;
  }
  MINIRL_METHOD Floats slope(Floats x) const {
    const Floats y = bounded(x), z = y * y;
    const Sigmoids s = sigmoids(y * (splat(1.59576912f) + splat(0.0713548163f) * z));
    return s.value + y * (s.value * s.complement) * (splat(1.59576912f) + splat(0.214064449f) * z);
  }
  // The sigmoid is exactly 0 or 1 at the bounds, and no power overflows.
  static MINIRL_METHOD Floats bounded(Floats x) { return max(splat(-64.f), at_most(x, 64.f)); }
};

// x tanh(log(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2).
struct Mish {
  MINIRL_METHOD Floats value(Floats x) const {
    const Floats n = numerator(bounded(x));
    return x * (n / (n + splat(2.f)));
  }
  MINIRL_METHOD Floats slope(Floats x) const {
    const Floats y = bounded(x), n = numerator(y), m = n + splat(2.f);
    return n / m + y * sigmoids(y).value * (splat(4.f) * (n + splat(1.f)) / (m * m));
  }
  static MINIRL_METHOD Floats numerator(Floats x) {
    const Floats e = exp_precise(x);
    return e * (e + splat(2.f));
  }
  // Above 15 the quotient is 1; without the bound e^4x would overflow.
  static MINIRL_METHOD Floats bounded(Floats x) { return at_most(x, 15.f); }
};

// Functions of the C library, one lane after another.
template <class F>
MINIRL_INLINE Floats each_lane(Floats v, F f) {
  float a[kLanes];
  store(a, v);
  for (int i = 0; i < kLanes; ++i) a[i] = f(a[i]);
  return load(a);
}
struct Rsqrt {
  MINIRL_METHOD Floats value(Floats x) const {
    return splat(1.f) / each_lane(x, [](float v) { return sqrtf(v); });
  }
};
struct Exp2 {
  MINIRL_METHOD Floats value(Floats x) const {
    return each_lane(x, [](float v) { return exp2f(v); });
  }
};
struct Pow {
  float exponent;
  MINIRL_METHOD Floats value(Floats x) const {
    return each_lane(x, [this](float v) { return powf(v, exponent); });
  }
};

template <class F>
MINIRL_INLINE void for_each_lanes(const Elementwise& args, int64_t begin, int64_t end, F visit) {
  end = end * kElementwiseBlock < args.size ? end * kElementwiseBlock : args.size;
  for (int64_t j = begin * kElementwiseBlock; j < end; j += kLanes)
    visit(j, end - j < kLanes ? end - j : (int64_t)kLanes);
}

template <class T, class F>
MINIRL_INLINE void values(const Elementwise& args, int64_t begin, int64_t end, F f) {
  const T* const x = (const T*)args.x;
  for_each_lanes(args, begin, end, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    store_first((T*)args.out + j, f.value(load_first(x + j, n)), n);
  });
}

template <class T, class F>
MINIRL_INLINE void values_or_gradients(const Elementwise& args, int64_t begin, int64_t end, F f) {
  if (!args.grad) return values<T>(args, begin, end, f);
  const T *const x = (const T*)args.x, *const grad = (const T*)args.grad;
  for_each_lanes(args, begin, end, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    store_first((T*)args.out + j, load_first(grad + j, n) * f.slope(load_first(x + j, n)), n);
  });
}

template <class T>
MINIRL_INLINE void run(const T*, const Elementwise& args, int64_t begin, int64_t end) {
  switch (args.function) {
    case Function::kSigmoid:
      return values_or_gradients<T>(args, begin, end, Sigmoid{});
    case Function::kSilu:
      return values_or_gradients<T>(args, begin, end, Silu{});
    case Function::kSoftplus:
      return values_or_gradients<T>(args, begin, end, Softplus{args.a, args.b});
    case Function::kGelu:
      return values_or_gradients<T>(args, begin, end, Gelu{});
    case Function::kGeluTanh:
      return values_or_gradients<T>(args, begin, end, GeluTanh{});
    case Function::kMish:
      return values_or_gradients<T>(args, begin, end, Mish{});
    case Function::kRsqrt:
      return values<T>(args, begin, end, Rsqrt{});
    case Function::kExp2:
      return values<T>(args, begin, end, Exp2{});
    case Function::kPow:
      return values<T>(args, begin, end, Pow{args.a});
  }
}

}  // namespace

void MINIRL_KERNEL(elementwise)(const Elementwise& args, int64_t begin, int64_t end) {
  with_float(args.dtype, [&](auto* type) __attribute__((always_inline)) { run(type, args, begin, end); });
}

}  // namespace minirl
