// Softmax of each row, its logarithm, and their gradients.
#include "cpu/softmax.h"

#include "cpu/sums.h"

namespace minirl {
namespace {

constexpr float kLog2E = 1.44269504f;

template <class T>
MINIRL_INLINE float row_max(const T* x, int64_t n) {
  Floats m[4];
  for (int64_t u = 0; u < 4; ++u) m[u] = splat(-INFINITY);
  int64_t j = 0;
  for (; j + kPartials <= n; j += kPartials)
    for (int64_t u = 0; u < 4; ++u) m[u] = max(m[u], load(x + j + u * kLanes));
  for (; j < n; j += kLanes) m[0] = max(m[0], load_first(x + j, n - j));
  float a[kLanes];
  store(a, max(max(m[0], m[1]), max(m[2], m[3])));
  for (int64_t half = kLanes / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) a[i] = a[i + half] > a[i] ? a[i + half] : a[i];
  return a[0];
}

// A row with NaN or infinity becomes NaN by its sum; a row of only -inf becomes NaN by its maximum.
template <class T, class U>
MINIRL_INLINE void softmax_row(const T* x, U* out, int64_t n, bool log_of_it) {
  const float maximum = row_max(x, n);
  const Floats shift = splat(maximum);
  auto power = [&](int64_t j, int64_t lanes)
                   __attribute__((always_inline)) { return exp_lanes(load_first(x + j, lanes) - shift); };
  if (log_of_it) {
    const Floats log_sum = splat((float)log(row_sum(n, power)));
    for (int64_t j = 0; j < n; j += kLanes) store_first(out + j, load_or_zero(x + j, n - j) - shift - log_sum, n - j);
    return;
  }
  // the powers are kept if there is room
  float buffer[kSumBlock];
  float* kept = sizeof(U) == sizeof(float) ? (float*)out : n <= kSumBlock ? buffer : nullptr;
  if (!kept) {
    const Floats scale = splat((float)(1.0 / row_sum(n, power)));
    for (int64_t j = 0; j < n; j += kLanes) store_first(out + j, power(j, n - j) * scale, n - j);
    return;
  }
  const double sum = row_sum(n, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    const Floats e = power(j, lanes);
    store_first(kept + j, e, lanes);
    return e;
  });
  const Floats scale = splat((float)(1.0 / sum));
  for (int64_t j = 0; j < n; j += kLanes) store_first(out + j, load_or_zero(kept + j, n - j) * scale, n - j);
}

// p (g - sum(p g)) for a softmax p; g - e^q sum(g) for its logarithm q
template <class T, class U>
MINIRL_INLINE void softmax_row_backward(const T* grad, const T* output, U* out, int64_t n, bool log_of_it) {
  const Floats sum = splat((float)row_sum(n, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    const Floats g = load_or_zero(grad + j, lanes);
    return log_of_it ? g : g * load_or_zero(output + j, lanes);
  }));
  for (int64_t j = 0; j < n; j += kLanes) {
    const Floats g = load_or_zero(grad + j, n - j), y = load_or_zero(output + j, n - j);
    store_first(out + j, log_of_it ? g - exp_lanes(y) * sum : y * (g - sum), n - j);
  }
}

}  // namespace

void MINIRL_KERNEL(softmax)(const Softmax& args, int64_t begin, int64_t end) {
  with_floats(args.x.dtype, args.out.dtype, [&](auto* x_type, auto* out_type) __attribute__((always_inline)) {
    for (int64_t row = begin; row < end; ++row)
      softmax_row(row_of(x_type, args.x, row), row_of(out_type, args.out, row), args.out.size, args.log);
  });
}

void MINIRL_KERNEL(softmax_backward)(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  with_floats(args.out.dtype, args.grad.dtype, [&](auto* out_type, auto* grad_type) __attribute__((always_inline)) {
    for (int64_t row = begin; row < end; ++row)
      softmax_row_backward(row_of(grad_type, args.grad, row), row_of(grad_type, args.output, row),
                           row_of(out_type, args.out, row), args.out.size, args.log);
  });
}

}  // namespace minirl
