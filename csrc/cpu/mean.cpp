// Sums and means over the rows or over the columns of a matrix.
#include "cpu/mean.h"

#include "cpu/sums.h"

namespace minirl {

void MINIRL_KERNEL(mean_rows)(const Mean& args, int64_t begin, int64_t end) {
  const int64_t blocks = sum_blocks(args.reduced);
  with_floats(args.x.dtype, args.out_dtype, [&](auto* x_type, auto* out_type) __attribute__((always_inline)) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / blocks, first = item % blocks * kSumBlock;
      const auto* x = row_of(x_type, args.x, row) + first;
      const float sum = block_sum(smaller(args.reduced - first, kSumBlock),
                                  [&](int64_t j, int64_t lanes)
                                      __attribute__((always_inline)) { return load_or_zero(x + j, lanes); });
      if (blocks == 1)
        store_one((decltype(out_type))args.out + row, sum / (float)args.divisor);
      else
        args.partials[item] = sum;
    }
  });
}

void MINIRL_KERNEL(mean_columns)(const Mean& args, int64_t begin, int64_t end) {
  const int64_t blocks = sum_blocks(args.reduced), columns = strips(args.inner);
  const Floats divisor = splat((float)args.divisor);
  with_floats(args.x.dtype, args.out_dtype, [&](auto* x_type, auto* out_type) __attribute__((always_inline)) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t strip = item % columns * kStrip, row_and_block = item / columns;
      const int64_t first = row_and_block % blocks * kSumBlock;
      const auto* x = row_of(x_type, args.x, row_and_block / blocks) + first * args.reduced_stride + strip;
      auto* out = (decltype(out_type))args.out + row_and_block * args.inner + strip;
      float* partials = args.partials + row_and_block * args.inner + strip;
      column_sums(
          smaller(args.reduced - first, kSumBlock), smaller(args.inner - strip, kStrip),
          [&](int64_t row, int64_t column, int64_t lanes)
              __attribute__((always_inline)) { return load_or_zero(x + row * args.reduced_stride + column, lanes); },
          [&](int64_t column, Floats sums, int64_t lanes) __attribute__((always_inline)) {
            if (blocks == 1)
              store_first(out + column, sums / divisor, lanes);
            else
              store_first(partials + column, sums, lanes);
          });
    }
  });
}

void MINIRL_KERNEL(mean_of_blocks)(const Mean& args, int64_t begin, int64_t end) {
  const int64_t blocks = sum_blocks(args.reduced);
  with_float(args.out_dtype, [&](auto* out_type) __attribute__((always_inline)) {
    for (int64_t i = begin; i < end; ++i) {
      const float* partials = args.partials + i / args.inner * blocks * args.inner + i % args.inner;
      double total = 0;
      for (int64_t block = 0; block < blocks; ++block) total += partials[block * args.inner];
      store_one((decltype(out_type))args.out + i, (float)(total / args.divisor));
    }
  });
}

}  // namespace minirl
