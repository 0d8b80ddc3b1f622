// Root-mean-square normalisation of each row, and its gradients.
#include "cpu/rms_norm.h"

#include "cpu/sums.h"

namespace minirl {
namespace {

// weight, or 1 where there is none
MINIRL_INLINE Floats weight_at(const float* weight, int64_t j, int64_t lanes) {
  return weight ? load_or_zero(weight + j, lanes) : splat(1.f);
}

template <class T>
MINIRL_INLINE float normalize_row(const T* x, T* out, const float* weight, int64_t n, double eps) {
  const double squares = row_sum(n, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    const Floats v = load_or_zero(x + j, lanes);
    return v * v;
  });
  const float rstd = (float)(1.0 / sqrt(squares / (double)n + eps));
  const Floats factor = splat(rstd);
  for (int64_t j = 0; j < n; j += kLanes)
    store_first(out + j, load_or_zero(x + j, n - j) * factor * weight_at(weight, j, n - j), n - j);
  return rstd;
}

// d x = rstd (g - y mean(g y)), with y = x rstd and g = grad weight
template <class T>
MINIRL_INLINE void normalize_row_backward(const T* x, const T* grad, T* out, const float* weight, float rstd,
                                          int64_t n) {
  const Floats factor = splat(rstd);
  auto g_at = [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    return load_or_zero(grad + j, lanes) * weight_at(weight, j, lanes);
  };
  const double dot = row_sum(n, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    return g_at(j, lanes) * (load_or_zero(x + j, lanes) * factor);
  });
  const Floats mean = splat((float)(dot / (double)n));
  for (int64_t j = 0; j < n; j += kLanes) {
    const Floats y = load_or_zero(x + j, n - j) * factor;
    store_first(out + j, factor * (g_at(j, n - j) - y * mean), n - j);
  }
}

}  // namespace

void MINIRL_KERNEL(rms_norm)(const RmsNorm& args, int64_t begin, int64_t end) {
  with_float(args.x.dtype, [&](auto* type) __attribute__((always_inline)) {
    for (int64_t row = begin; row < end; ++row)
      args.rstd[row] =
          normalize_row(row_of(type, args.x, row), row_of(type, args.out, row), args.weight, args.x.size, args.eps);
  });
}

void MINIRL_KERNEL(rms_norm_backward)(const RmsNormBackward& args, int64_t begin, int64_t end) {
  with_float(args.x.dtype, [&](auto* type) __attribute__((always_inline)) {
    for (int64_t row = begin; row < end; ++row)
      normalize_row_backward(row_of(type, args.x, row), row_of(type, args.grad, row), row_of(type, args.out, row),
                             args.weight, args.rstd[row], args.x.size);
  });
}

void MINIRL_KERNEL(rms_norm_weight_partials)(const RmsNormBackward& args, int64_t begin, int64_t end) {
  with_float(args.x.dtype, [&](auto* type) __attribute__((always_inline)) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / strips(args.x.size), strip = item % strips(args.x.size) * kStrip;
      const int64_t first = block * kSumBlock;
      column_sums(
          smaller(args.x.count - first, kSumBlock), smaller(args.x.size - strip, kStrip),
          [&](int64_t row, int64_t column, int64_t lanes) __attribute__((always_inline)) {
            const int64_t at = strip + column;
            return load_or_zero(row_of(type, args.grad, first + row) + at, lanes) *
                   (load_or_zero(row_of(type, args.x, first + row) + at, lanes) * splat(args.rstd[first + row]));
          },
          [&](int64_t column, Floats sums, int64_t lanes) __attribute__((always_inline)) {
            store_first(args.partials + block * args.x.size + strip + column, sums, lanes);
          });
    }
  });
}

void MINIRL_KERNEL(rms_norm_weight_grad)(const RmsNormBackward& args, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    double total = 0;
    for (int64_t block = 0; block < sum_blocks(args.x.count); ++block) total += args.partials[block * args.x.size + j];
    args.weight_grad[j] = (float)total;
  }
}

}  // namespace minirl
