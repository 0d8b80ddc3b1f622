// The matmul that several ops share: a block of float32 output from packed panels of both operands.
//
// Every output is a sum, in order, over chunks of kChunk terms of the reduced dimension. A chunk is a sum, in order, of
// chains of fused multiply-adds over kLinkWords words. So the bits of an output depend on that dimension and the dtype
// alone: not on its place, the rows beside it, or the threads. They are equal on all tables with a fused multiply-add.
// bfloat16 is reduced in pairs, the second term of a pair first, as its instruction does (which takes subnormals as 0).
// Tiles (tiles.h) reduce bfloat16 in their own order, whose bits no other table has.
#pragma once
#include <stdlib.h>

#include "cpu/panels.h"

namespace {

typedef float UnalignedFloat __attribute__((vector_size(4 * kNative), aligned(4)));

template <class T>
MINIRL_INLINE NativeFloat multiply_add(FloatWord<T>, uint32_t a, NativeFloat b, NativeFloat sum) {
  float x;
  memcpy(&x, &a, sizeof x);
#if defined(__AVX512F__)
  return (NativeFloat)_mm512_fmadd_ps(_mm512_set1_ps(x), (__m512)b, (__m512)sum);
#elif defined(__FMA__)
  return (NativeFloat)_mm256_fmadd_ps(_mm256_set1_ps(x), (__m256)b, (__m256)sum);
#else
  return sum + b * x;
#endif
}
#if defined(__AVX512BF16__)
MINIRL_INLINE NativeFloat multiply_add(PairWord, uint32_t a, NativeFloat b, NativeFloat sum) {
  return (NativeFloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
#endif

// The destination of a chunk's sums. With `add` they are added to `sums`. The result goes to `rounded` if it is given.
template <class T>
struct Place {
  float* sums;
  int64_t stride;
  bool add;
  T* rounded;
  int64_t rounded_stride;
};

// Stores the sums of a panel.
template <class T>
MINIRL_INLINE void add_or_round(const Place<T>& place, const NativeFloat (*sum)[2], int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    float row[kPanelColumns > kLanes ? kPanelColumns : kLanes];
    memcpy(row, sum[i], sizeof sum[i]);
    float* const sums = place.sums + i * place.stride;
    for (int64_t j = 0; place.add && j < columns; ++j) row[j] += sums[j];
    if (!place.rounded) {
      memcpy(sums, row, columns * sizeof(float));
      continue;
    }
    for (int64_t j = 0; j < columns; j += kLanes)
      store_first(place.rounded + i * place.rounded_stride + j, load(row + j), columns - j);
  }
}

// Stores whole rows of a panel from the registers.
template <class T, int kRows>
MINIRL_INLINE void round_panel(const Place<T>& place, const NativeFloat (&sum)[kRows][2]) {
  constexpr int kParts = kLanes / kNative;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    for (int part = 0; part + kParts <= 2; part += kParts) {
      Floats sums;
      for (int j = 0; j < kParts; ++j) sums.part[j] = sum[i][part + j];
      store(place.rounded + i * place.rounded_stride + part * kNative, sums);
    }
  }
}

// One chunk's share of kRows by kPanelColumns outputs.
template <class Word, class T, int kRows>
static void multiply_panels(const uint32_t* a, const uint32_t* b, int64_t words, const Place<T>& place,
                            int64_t columns) {
  NativeFloat sum[kRows][2] = {};
  // fetched while the chunk is summed
  for (int i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kPanelColumns; j += 16) __builtin_prefetch(place.sums + i * place.stride + j, 1);
  for (int64_t begin = 0; begin < words; begin += Word::kLinkWords) {
    NativeFloat link[kRows][2] = {};
    for (int64_t k = begin; k < least(words, begin + Word::kLinkWords); ++k) {
      const NativeFloat left = *(const UnalignedFloat*)(b + k * kPanelColumns);
      const NativeFloat right = *(const UnalignedFloat*)(b + k * kPanelColumns + kNative);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        link[i][0] = multiply_add(Word{}, a[k * kRegisterRows + i], left, link[i][0]);
        link[i][1] = multiply_add(Word{}, a[k * kRegisterRows + i], right, link[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int half = 0; half < 2; ++half) sum[i][half] = sum[i][half] + link[i][half];
  }
  if (place.rounded && !place.add && columns == kPanelColumns && kPanelColumns >= kLanes)
    return round_panel<T, kRows>(place, sum);
  if (columns < kPanelColumns || place.rounded) return add_or_round<T>(place, sum, kRows, columns);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    for (int half = 0; half < 2; ++half) {
      UnalignedFloat* to = (UnalignedFloat*)(place.sums + i * place.stride + half * kNative);
      *to = place.add ? *to + sum[i][half] : sum[i][half];
    }
  }
}

template <int kRows, class Word, class T>
MINIRL_INLINE void multiply_some_rows(int64_t rows, const uint32_t* a, const uint32_t* b, int64_t words,
                                      const Place<T>& place, int64_t columns) {
  if (rows == kRows) return multiply_panels<Word, T, kRows>(a, b, words, place, columns);
  if constexpr (kRows > 1) multiply_some_rows<kRows - 1, Word>(rows, a, b, words, place, columns);
}

// One chunk's share of up to Word::kRows by kPanelColumns outputs.
template <class Word, class T>
MINIRL_INLINE void multiply_rows(Word, int64_t rows, const uint32_t* a, const uint32_t* b, int64_t words,
                                 const Place<T>& place, int64_t columns) {
  multiply_some_rows<Word::kRows, Word>(rows, a, b, words, place, columns);
}
#if defined(__AMX_BF16__)
static void multiply_rows(TileWord, int64_t rows, const uint32_t* a, const uint32_t* b, int64_t words,
                          Place<BFloat16> place, int64_t columns) {
  alignas(64) NativeFloat sum[TileWord::kRows][2];
  const bool down = rows > kTileRows, across = columns > kTileWords;
  const bool whole = rows % kTileRows == 0 && columns % kTileWords == 0;
  if (place.add && !whole)
    for (int64_t i = 0; i < rows; ++i) memcpy(sum[i], place.sums + i * place.stride, columns * sizeof(float));
  Place<BFloat16> here = place;
  if (!whole) here.sums = (float*)sum, here.stride = kPanelColumns;
  const bool direct = whole && !place.rounded;
  const auto multiply = down ? (across ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                             : (across ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
  multiply(a, b, kPanelColumns, words, place.add ? here.sums : nullptr, here.stride, direct ? place.sums : (float*)sum,
           direct ? place.stride : kPanelColumns);
  place.add = false;  // the tiles have added already
  if (!direct) add_or_round(place, sum, rows, columns);
}
#endif

// out[rows, columns] (+)= a[rows, depth] b[depth, columns]
template <class T>
struct Block {
  Operand<T> a, b;
  float* out;
  int64_t out_stride, rows, columns, depth;
  bool accumulate;
  T* rounded = nullptr;  // if given, the result goes here, and `out` is scratch
  int64_t rounded_stride = 0;
  const uint32_t* packed_b = nullptr;  // if given, all panels of b by pack_matrix, and `b` is not read

  Block some_rows(int64_t first, int64_t count) const {
    Block part = *this;
    part.a = a.from(first);
    part.out += first * out_stride;
    if (rounded) part.rounded += first * rounded_stride;
    part.rows = least(rows - first, count);
    return part;
  }
  Place<T> place(int64_t row, int64_t column, int64_t term, bool last) const {
    return {out + row * out_stride + column, out_stride, accumulate || term > 0,
            last && rounded ? rounded + row * rounded_stride + column : nullptr, rounded_stride};
  }
};

template <class T>
MINIRL_INLINE int64_t panel_words(int64_t columns) {
  typedef typename WordOf<T>::type Word;
  return (columns + kPanelColumns - 1) / kPanelColumns * kPanelColumns * Word::words(Word::kChunk) + kLanes;
}
// Words of scratch for blocks of up to `columns`.
template <class T>
MINIRL_INLINE int64_t scratch_words(int64_t columns) {
  typedef typename WordOf<T>::type Word;
  return panel_words<T>(columns) + Word::kRows * Word::words(Word::kChunk) + kLanes;
}

// Packs a panel of columns for one chunk.
template <class Word, class T>
MINIRL_INLINE void pack_columns(const Operand<T>& b, int64_t column, int64_t columns, int64_t term, int64_t terms,
                                uint32_t* out) {
  for (int64_t part = 0; part < least(columns, kPanelColumns); part += kLanes) {
    const int64_t lanes = least(columns - part, kLanes);
    pack_panel<Word>(b, column + part, least(lanes, kPanelColumns), term, terms, kPanelColumns, out + part);
  }
}

// The words of all columns for all of `depth`, packed panel by panel, and each panel chunk by chunk.
template <class T>
MINIRL_INLINE int64_t packed_words(int64_t columns, int64_t depth) {
  return (columns + kPanelColumns - 1) / kPanelColumns * kPanelColumns * WordOf<T>::type::words(depth) + kLanes;
}
// The offset of the panel whose first column is `column`.
template <class T>
MINIRL_INLINE int64_t packed_words_before(int64_t column, int64_t depth) {
  return column * WordOf<T>::type::words(depth);
}
template <class T>
static void pack_matrix(const Operand<T>& b, int64_t columns, int64_t depth, uint32_t* out) {
  typedef typename WordOf<T>::type Word;
  for (int64_t n = 0; n < columns; n += kPanelColumns)
    for (int64_t k = 0; k < depth; k += Word::kChunk)
      pack_columns<Word>(b, n, columns - n, k, least(depth - k, Word::kChunk),
                         out + packed_words_before<T>(n, depth) + kPanelColumns * Word::words(k));
}

// The packed columns stay in the second-level cache while panels of rows pass by, packed in the first-level cache.
template <class T>
static void multiply_many_rows(const Block<T>& block, uint32_t* scratch) {
  typedef typename WordOf<T>::type Word;
  uint32_t *packed_b = scratch, *packed_a = scratch + panel_words<T>(block.columns);
  for (int64_t k = 0; k < block.depth; k += Word::kChunk) {
    const int64_t terms = least(block.depth - k, Word::kChunk), words = Word::words(terms);
    // Terms that lie apart are read a few at a time for all columns: one panel's columns would touch a page for each
    // term. (A panel narrower than a store can only be filled from one end to the other.)
    const bool apart = block.b.term_stride != 1 || block.b.term_index;
    const int64_t strip = apart && kPanelColumns >= kLanes ? kStrip : terms;
    for (int64_t first = 0; first < terms; first += strip)
      for (int64_t n = 0; n < block.columns; n += kPanelColumns)
        pack_columns<Word>(block.b, n, block.columns - n, k + first, least(terms - first, strip),
                           packed_b + n * words + Word::words(first) * kPanelColumns);
    for (int64_t m = 0; m < block.rows; m += Word::kRows) {
      const int64_t rows = least(block.rows - m, Word::kRows);
      pack_rows(Word{}, block.a, m, rows, k, terms, packed_a);
      for (int64_t n = 0; n < block.columns; n += kPanelColumns)
        multiply_rows(Word{}, rows, packed_a, packed_b + n * words, words,
                      block.place(m, n, k, k + terms == block.depth), least(block.columns - n, kPanelColumns));
    }
  }
}

// All terms of the rows, packed, stay in the second-level cache while the columns pass panel by panel, in the order of
// their memory.
template <class T>
static void multiply_few_rows(const Block<T>& block, uint32_t* scratch) {
  typedef typename WordOf<T>::type Word;
  constexpr int64_t kPanelWords = Word::kRows * Word::kChunk / Word::kTerms;
  const int64_t panels = (block.rows + Word::kRows - 1) / Word::kRows;
  uint32_t *panel_of_b = scratch, *packed_a = scratch + panel_words<T>(kPanelColumns);
  for (int64_t k = 0; k < block.depth; k += Word::kChunk)
    for (int64_t panel = 0; panel < panels; ++panel)
      pack_rows(Word{}, block.a, panel * Word::kRows, least(block.rows - panel * Word::kRows, Word::kRows), k,
                least(block.depth - k, Word::kChunk), packed_a + (k / Word::kChunk * panels + panel) * kPanelWords);
  for (int64_t n = 0; n < block.columns; n += kPanelColumns) {
    for (int64_t k = 0; k < block.depth; k += Word::kChunk) {
      const int64_t terms = least(block.depth - k, Word::kChunk);
      const uint32_t* b = panel_of_b;
      if (block.packed_b)
        b = block.packed_b + packed_words_before<T>(n, block.depth) + kPanelColumns * Word::words(k);
      else
        pack_columns<Word>(block.b, n, block.columns - n, k, terms, panel_of_b);
      for (int64_t panel = 0; panel < panels; ++panel)
        multiply_rows(Word{}, least(block.rows - panel * Word::kRows, Word::kRows),
                      packed_a + (k / Word::kChunk * panels + panel) * kPanelWords, b, Word::words(terms),
                      block.place(panel * Word::kRows, n, k, k + terms == block.depth),
                      least(block.columns - n, kPanelColumns));
    }
  }
}

// The most rows whose terms, all packed, take no more room than one chunk of `columns`.
template <class T>
MINIRL_INLINE int64_t few_rows(int64_t columns, int64_t depth) {
  typedef typename WordOf<T>::type Word;
  const int64_t chunks = (depth + Word::kChunk - 1) / Word::kChunk;
  return (columns - kPanelColumns) / (chunks * Word::kRows) * Word::kRows;
}
// Rows at a time where the columns were packed before.
constexpr int64_t kPackedColumns = 512;
template <class T>
MINIRL_INLINE int64_t rows_at_once(int64_t depth) {
  constexpr int kRows = WordOf<T>::type::kRows;
  const int64_t few = few_rows<T>(kPackedColumns, depth);
  return few < kRows ? kRows : few;
}
// Words of scratch for packed columns.
template <class T>
MINIRL_INLINE int64_t scratch_words_packed(int64_t depth) {
  typedef typename WordOf<T>::type Word;
  return panel_words<T>(kPanelColumns) + rows_at_once<T>(depth) * (Word::words(depth) + Word::kChunk) + kLanes;
}

// Run before and after the products of a block.
template <class Word>
MINIRL_INLINE void begin_products(Word) {}
template <class Word>
MINIRL_INLINE void end_products(Word) {}
#if defined(__AMX_BF16__)
MINIRL_INLINE void begin_products(TileWord) { open_tiles(); }
MINIRL_INLINE void end_products(TileWord) { close_tiles(); }
#endif

template <class T>
static void multiply_block(const Block<T>& block, uint32_t* scratch) {
  typedef typename WordOf<T>::type Word;
  if (block.depth == 0) return;
  begin_products(Word{});
  if (block.packed_b) {
    const int64_t rows = rows_at_once<T>(block.depth);
    for (int64_t m = 0; m < block.rows; m += rows) multiply_few_rows(block.some_rows(m, rows), scratch);
  } else if (block.rows <= few_rows<T>(block.columns, block.depth) && block.b.term_stride == 1 && !block.b.term_index) {
    multiply_few_rows(block, scratch);
  } else {
    multiply_many_rows(block, scratch);
  }
  end_products(Word{});
}

}  // namespace
