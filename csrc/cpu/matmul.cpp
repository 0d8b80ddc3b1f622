// The shared matmul over whole matrices, block by block of the output.
#include "cpu/matmul.h"

#include "cpu/gemm.h"

namespace minirl {
namespace {

template <class T>
MINIRL_INLINE void multiply_blocks(const Matmul& args, int64_t begin, int64_t end) {
  const int64_t across = pieces(args.columns, args.block_columns);
  uint32_t* scratch =
      (uint32_t*)aligned_alloc(64, (scratch_words<T>(least(args.columns, args.block_columns)) + 15) / 16 * 64);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t m = index / across * args.block_rows, n = index % across * args.block_columns;
    const int64_t rows = args.rows - m, columns = args.columns - n;
    multiply_block<T>(
        {{(const T*)args.a.data + m * args.a.row_stride, args.a.row_stride, args.a.column_stride, rows},
         {(const T*)args.b.data + n * args.b.column_stride, args.b.column_stride, args.b.row_stride, columns},
         args.out + m * args.out_stride + n,
         args.out_stride,
         least(rows, args.block_rows),
         least(columns, args.block_columns),
         args.depth,
         args.accumulate},
        scratch);
  }
  free(scratch);
}

}  // namespace

void MINIRL_KERNEL(matmul)(const Matmul& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return multiply_blocks<float>(args, begin, end);
    case DType::kBFloat16:
      return multiply_blocks<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return multiply_blocks<Float16>(args, begin, end);
  }
}

}  // namespace minirl
