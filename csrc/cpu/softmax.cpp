// Softmax of each row, its logarithm, and their gradients.
#include "cpu/softmax.h"

#include "cpu/row_types.h"
#include "cpu/rows.h"
#include "cpu/sums.h"

namespace minirl {
namespace {

template <class T, class U>
MINIRL_INLINE void softmax_row(const T* x, U* out, int64_t n, bool log_of_it) {
  ForgetExponentials forget;
  const RowSums sums = row_sums(x, n, kLog2E, forget);
  if (!log_of_it)
    return write_gradient<false>(x, out, n, kLog2E, sums.shift, (float)(1.0 / sums.sum), 0.f, NoSoftcap{});
  const Floats shift = splat(sums.shift), log_sum = splat((float)log((double)sums.sum));
  for (int64_t j = 0; j < n; j += kLanes) store_first(out + j, load_or_zero(x + j, n - j) - shift - log_sum, n - j);
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
  with_types(args.x.dtype, args.out.dtype, [&](auto* x_type, auto* out_type) __attribute__((always_inline)) {
    for (int64_t row = begin; row < end; ++row)
      softmax_row(row_of(x_type, args.x, row), row_of(out_type, args.out, row), args.size, args.log);
  });
}

void MINIRL_KERNEL(softmax_backward)(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  with_types(args.out.dtype, args.grad.dtype, [&](auto* out_type, auto* grad_type) __attribute__((always_inline)) {
    for (int64_t row = begin; row < end; ++row)
      softmax_row_backward(row_of(grad_type, args.grad, row), row_of(grad_type, args.output, row),
                           row_of(out_type, args.out, row), args.size, args.log);
  });
}

}  // namespace minirl
