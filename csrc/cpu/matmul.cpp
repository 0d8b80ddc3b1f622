// The shared matmul over pieces of whole matrices, with an addend.
#include "cpu/matmul.h"

#include "cpu/few_rows.h"
#include "cpu/gemm.h"

namespace minirl {
namespace {

// out = alpha sums + beta addend; `out` may be `sums`.
template <class T, class Out>
MINIRL_INLINE void write_row(const float* sums, const T* addend, float alpha, float beta, int64_t n, Out* out) {
  const Floats alphas = splat(alpha), betas = splat(beta);
  for (int64_t j = 0; j < n; j += kLanes) {
    Floats v = alphas * load_first(sums + j, n - j);
    if (addend) v = v + betas * load_first(addend + j, n - j);
    store_first(out + j, v, n - j);
  }
}

template <class T, class Out>
MINIRL_INLINE void multiply_piece(const Matmul& args, const Piece& piece, float* sums, uint32_t* scratch) {
  constexpr bool kRounds = sizeof(Out) < sizeof(float);
  Out* const out = (Out*)args.out + piece.out;
  const T* const addend = args.addend ? (const T*)args.addend + piece.addend : nullptr;
  const bool finishes = addend || args.alpha != 1.f || (kRounds && piece.depth == 0);
  Block<T> block = {
      {(const T*)args.a.data + piece.a, args.a.row_stride, args.a.column_stride, piece.rows_left},
      {(const T*)args.b.data + piece.b, args.b.column_stride, args.b.row_stride, piece.columns_left},
      kRounds ? sums : (float*)out,
      kRounds ? piece.columns : args.out_stride,
      piece.rows,
      piece.columns,
      piece.depth,
      args.accumulate,
  };
  if constexpr (kRounds) {
    block.rounded = finishes ? nullptr : out;
    block.rounded_stride = args.out_stride;
  }
  if (piece.depth == 0 && !args.accumulate)
    for (int64_t i = 0; i < piece.rows; ++i) memset(block.out + i * block.out_stride, 0, piece.columns * sizeof(float));
  if (is_for_few_rows(block))
    multiply_few_rows_unpacked(block, scratch);
  else
    multiply_block<T>(block, scratch);
  for (int64_t i = 0; finishes && i < piece.rows; ++i)
    write_row(block.out + i * block.out_stride, addend ? addend + i * args.addend_stride : nullptr, args.alpha,
              args.beta, piece.columns, out + i * args.out_stride);
}

template <class T, class Out>
MINIRL_INLINE void multiply_pieces(const T*, const Out*, const Matmul& args, int64_t begin, int64_t end) {
  int64_t columns = 0, elements = 0, depth = 0;
  for (int64_t index = begin; index < end; ++index) {
    const Piece& piece = args.pieces[index];
    columns = most(columns, piece.columns);
    elements = most(elements, piece.rows * piece.columns);
    if (piece.rows <= kFewRows) depth = most(depth, piece.depth);
  }
  const int64_t words = (most(scratch_words<T>(columns), scratch_words_few_rows<T>(columns, depth)) + 15) / 16 * 16;
  const int64_t sums = sizeof(Out) < sizeof(float) ? (elements + 15) / 16 * 16 : 0;
  uint32_t* const scratch = (uint32_t*)aligned_alloc(64, (words + sums) * sizeof(uint32_t));
  for (int64_t index = begin; index < end; ++index)
    multiply_piece<T, Out>(args, args.pieces[index], (float*)(scratch + words), scratch);
  free(scratch);
}

}  // namespace

void MINIRL_KERNEL(matmul)(const Matmul& args, int64_t begin, int64_t end) {
  with_floats(args.dtype, args.out_dtype, [&](auto* type, auto* out_type) __attribute__((always_inline)) {
    multiply_pieces(type, out_type, args, begin, end);
  });
}

}  // namespace minirl
