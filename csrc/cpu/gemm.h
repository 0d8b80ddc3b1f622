// The matmul that several ops share: a block of float32 output from packed panels of both operands.
//
// Every output is a sum, in order, of chains of fused multiply-adds over kChunk terms of the reduced dimension. So its
// bits depend on that dimension and the dtype alone: not on its place, on the rows beside it, or on the threads; and
// they are the same wherever there is a fused multiply-add. bfloat16 is reduced in pairs, the second of a pair first,
// which is what the instruction for it does (that one takes subnormals as 0).
#pragma once
#include <stdlib.h>

#include "cpu/lanes.h"

namespace {

// Accumulators of kPanelRows by two vectors, and the operands of a step, fill the registers.
#if defined(__AVX512F__)
constexpr int kPanelRows = 14;
#else
constexpr int kPanelRows = 6;
#endif
constexpr int kPanelColumns = 2 * kNative;
constexpr int64_t kStrip = 32;

// What a packed word of 32 bits holds: `kTerms` terms of the reduced dimension, in place `place(k)` of a chunk.
template <class T>
struct FloatWord {
  static constexpr int kTerms = 1;
  static constexpr int64_t kChunk = 256;
  static int64_t place(int64_t k) { return k; }
  static int64_t words(int64_t terms) { return terms; }
};
template <>
struct FloatWord<BFloat16> {
  static constexpr int kTerms = 1;
  static constexpr int64_t kChunk = 512;
  static int64_t place(int64_t k) { return k ^ 1; }
  static int64_t words(int64_t terms) { return (terms + 1) & ~int64_t{1}; }
};
struct PairWord {
  static constexpr int kTerms = 2;
  static constexpr int64_t kChunk = 512;
  static int64_t place(int64_t k) { return k; }
  static int64_t words(int64_t terms) { return (terms + 1) / 2; }
};
#if defined(__AVX512BF16__)
template <class T>
struct WordOf {
  typedef FloatWord<T> type;
};
template <>
struct WordOf<BFloat16> {
  typedef PairWord type;
};
#else
template <class T>
struct WordOf {
  typedef FloatWord<T> type;
};
#endif

MINIRL_INLINE void store_words(uint32_t* p, Ints v) {
  MINIRL_EACH_PART memcpy(p + i * kNative, &v.part[i], sizeof v.part[i]);
}

// Sixteen words along the reduced dimension from `p`.
template <class T>
MINIRL_INLINE Ints words_along(FloatWord<T>, const T* p) {
  return bits_of(load(p));
}
MINIRL_INLINE Ints words_along(PairWord, const BFloat16* p) {
  Ints r;
  memcpy(&r, p, sizeof r);
  return r;
}
// One word of each of sixteen neighbours, whose first and last terms are at `p` and `q`.
template <class T>
MINIRL_INLINE Ints words_across(FloatWord<T>, const T* p, const T*) {
  return bits_of(load(p));
}
MINIRL_INLINE Ints words_across(PairWord, const BFloat16* p, const BFloat16* q) {
  Ints first = load_halves(p), second = load_halves(q);
  MINIRL_EACH_PART first.part[i] |= second.part[i] << 16;
  return first;
}

// words[i] lane j becomes words[j] lane i.
MINIRL_INLINE void transpose(Ints (&words)[kLanes]) {
#if defined(__AVX512F__)
  __m512i a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; ++i) a[i] = (__m512i)words[i].part[0];
  for (int i = 0; i < kLanes; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    words[i].part[0] = (NativeInt)_mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    words[i + 8].part[0] = (NativeInt)_mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
  }
#else
  uint32_t square[kLanes][kLanes], turned[kLanes][kLanes];
  memcpy(square, words, sizeof square);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) turned[j][i] = square[i][j];
  memcpy(words, turned, sizeof turned);
#endif
}

// An operand: its lanes are the rows of the output (of the left one) or its columns (of the right one), its terms are
// summed over. An index says where the lanes or the terms lie, so that what it gathers is never copied but in packing.
template <class T>
struct Operand {
  const T* data;
  int64_t lane_stride, term_stride;     // in elements; one of them is 1: the latter if lanes are gathered, else
                                        // the former if terms are
  int64_t readable;                     // lanes from the first on that lie beside each other, where lane_stride is 1
  const int64_t* lane_index = nullptr;  // of each lane, or null: lane i is the i-th
  const int64_t* term_index = nullptr;

  const T* at(int64_t lane, int64_t term) const {
    return data + (lane_index ? lane_index[lane] : lane) * lane_stride +
           (term_index ? term_index[term] : term) * term_stride;
  }
  Operand from(int64_t lane) const {
    Operand rest = *this;
    if (lane_index)
      rest.lane_index += lane;
    else
      rest.data += lane * lane_stride;
    rest.readable -= lane;
    return rest;
  }
};

// A panel of an operand for one chunk, `terms` from `term` on of `lanes` from `lane` on: word k of lane i goes to
// out[k * width + i]. Writes sixteen words at a time, the last ones beyond what they mean; so `out` has sixteen words
// more than it needs.
template <class Word, class T>
MINIRL_INLINE void pack_panel(const Operand<T>& x, int64_t lane, int64_t lanes, int64_t term, int64_t terms,
                              int64_t width, uint32_t* out) {
  const int64_t words = Word::words(terms);
  constexpr int64_t kGroup = kLanes * Word::kTerms;
  if (x.term_stride == 1 && !x.term_index) {
    const T* from[kLanes];
    for (int64_t i = 0; i < lanes; ++i) from[i] = x.at(lane + i, term);
    for (int64_t k = 0; k < terms; k += kGroup) {
      Ints square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = Ints{};
        if (i >= lanes) continue;
        if (terms - k >= kGroup) {
          square[i] = words_along(Word{}, from[i] + k);
        } else {
          T padded[kGroup] = {};
          memcpy(padded, from[i] + k, (terms - k) * sizeof(T));
          square[i] = words_along(Word{}, padded);
        }
      }
      transpose(square);
      const int64_t first = k / Word::kTerms, count = words - first < kLanes ? words - first : kLanes;
      for (int64_t j = 0; j < count; ++j) store_words(out + (first + j) * width, square[Word::place(j)]);
    }
    return;
  }
  const int64_t next_strip = x.term_index ? 0 : kStrip * x.term_stride;
  for (int64_t word = 0; word < words; ++word) {
    const int64_t k = Word::place(word) * Word::kTerms, last = k + Word::kTerms - 1;
    if (last < terms && x.readable - lane >= kLanes) {
      const T *from = x.at(lane, term + k), *to = x.at(lane, term + last);
      __builtin_prefetch(from + next_strip);
      if (Word::kTerms > 1) __builtin_prefetch(to + next_strip);
      store_words(out + word * width, words_across(Word{}, from, to));
    } else {
      T padded[Word::kTerms * kLanes] = {};
      for (int64_t j = 0; j < Word::kTerms && k + j < terms; ++j)
        for (int64_t i = 0; i < lanes; ++i) padded[j * kLanes + i] = *x.at(lane + i, term + k + j);
      store_words(out + word * width, words_across(Word{}, padded, padded + (Word::kTerms - 1) * kLanes));
    }
  }
}

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

MINIRL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Where a chunk's share goes: added to `sums` if `add`, and if `rounded` is there, the result to that instead.
template <class T>
struct Place {
  float* sums;
  int64_t stride;
  bool add;
  T* rounded;
  int64_t rounded_stride;
};

// Whole rows of a panel, from the registers.
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

template <class T, int kRows>
MINIRL_INLINE void add_or_round(const Place<T>& place, const NativeFloat (&sum)[kRows][2], int64_t columns) {
  for (int i = 0; i < kRows; ++i) {
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

// One chunk's share of kRows by kPanelColumns outputs.
template <class Word, class T, int kRows>
static void multiply_panels(const uint32_t* a, const uint32_t* b, int64_t words, const Place<T>& place,
                            int64_t columns) {
  NativeFloat sum[kRows][2] = {};
  // what is added to comes from memory while the chunk is summed
  for (int i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kPanelColumns; j += 16) __builtin_prefetch(place.sums + i * place.stride + j, 1);
  for (int64_t k = 0; k < words; ++k) {
    const NativeFloat left = *(const UnalignedFloat*)(b + k * kPanelColumns);
    const NativeFloat right = *(const UnalignedFloat*)(b + k * kPanelColumns + kNative);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      sum[i][0] = multiply_add(Word{}, a[k * kPanelRows + i], left, sum[i][0]);
      sum[i][1] = multiply_add(Word{}, a[k * kPanelRows + i], right, sum[i][1]);
    }
  }
  if (place.rounded && !place.add && columns == kPanelColumns && kPanelColumns >= kLanes)
    return round_panel<T, kRows>(place, sum);
  if (columns < kPanelColumns || place.rounded) return add_or_round<T, kRows>(place, sum, columns);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    for (int half = 0; half < 2; ++half) {
      UnalignedFloat* to = (UnalignedFloat*)(place.sums + i * place.stride + half * kNative);
      *to = place.add ? *to + sum[i][half] : sum[i][half];
    }
  }
}

template <class Word, class T, int kRows = kPanelRows>
MINIRL_INLINE void multiply_rows(int64_t rows, const uint32_t* a, const uint32_t* b, int64_t words,
                                 const Place<T>& place, int64_t columns) {
  if (rows == kRows) return multiply_panels<Word, T, kRows>(a, b, words, place, columns);
  if constexpr (kRows > 1) multiply_rows<Word, T, kRows - 1>(rows, a, b, words, place, columns);
}

// out[rows, columns] (+)= a[rows, depth] b[depth, columns]
template <class T>
struct Block {
  Operand<T> a, b;
  float* out;
  int64_t out_stride, rows, columns, depth;
  bool accumulate;
  T* rounded = nullptr;  // if given, the result goes here, and `out` is scratch
  int64_t rounded_stride = 0;
  const uint32_t* packed_b = nullptr;  // if given, instead of `b`: all its panels, by pack_matrix

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
  return panel_words<T>(columns) + kPanelRows * Word::words(Word::kChunk) + kLanes;
}

// A panel of columns for one chunk.
template <class Word, class T>
MINIRL_INLINE void pack_columns(const Operand<T>& b, int64_t column, int64_t columns, int64_t term, int64_t terms,
                                uint32_t* out) {
  for (int64_t part = 0; part < least(columns, kPanelColumns); part += kLanes) {
    const int64_t lanes = least(columns - part, kLanes);
    pack_panel<Word>(b, column + part, least(lanes, kPanelColumns), term, terms, kPanelColumns, out + part);
  }
}

// All columns for all of `depth`, panel by panel, each chunk by chunk: packed_words of them.
template <class T>
MINIRL_INLINE int64_t packed_words(int64_t columns, int64_t depth) {
  return (columns + kPanelColumns - 1) / kPanelColumns * kPanelColumns * WordOf<T>::type::words(depth) + kLanes;
}
// Where the panel begins that begins with `column`.
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

// The packed columns stay in the second-level cache while panels of rows, packed in the first, pass over them.
template <class T>
static void multiply_many_rows(const Block<T>& block, uint32_t* scratch) {
  typedef typename WordOf<T>::type Word;
  uint32_t *packed_b = scratch, *packed_a = scratch + panel_words<T>(block.columns);
  for (int64_t k = 0; k < block.depth; k += Word::kChunk) {
    const int64_t terms = least(block.depth - k, Word::kChunk), words = Word::words(terms);
    // Terms that lie apart are read some at a time, all columns of them: a panel's alone would each be on another page.
    // (A panel narrower than a store may only be filled from one end to the other.)
    const bool apart = block.b.term_stride != 1 || block.b.term_index;
    const int64_t strip = apart && kPanelColumns >= kLanes ? kStrip : terms;
    for (int64_t first = 0; first < terms; first += strip)
      for (int64_t n = 0; n < block.columns; n += kPanelColumns)
        pack_columns<Word>(block.b, n, block.columns - n, k + first, least(terms - first, strip),
                           packed_b + n * words + Word::words(first) * kPanelColumns);
    for (int64_t m = 0; m < block.rows; m += kPanelRows) {
      const int64_t rows = least(block.rows - m, kPanelRows);
      pack_panel<Word>(block.a, m, rows, k, terms, kPanelRows, packed_a);
      for (int64_t n = 0; n < block.columns; n += kPanelColumns)
        multiply_rows<Word>(rows, packed_a, packed_b + n * words, words, block.place(m, n, k, k + terms == block.depth),
                            least(block.columns - n, kPanelColumns));
    }
  }
}

MINIRL_INLINE int64_t row_panels(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// All terms of the rows, packed, stay in the second-level cache while the columns pass, a panel at a time, all its
// terms as they lie in memory.
template <class T>
static void multiply_few_rows(const Block<T>& block, uint32_t* scratch) {
  typedef typename WordOf<T>::type Word;
  constexpr int64_t kPanelWords = kPanelRows * Word::kChunk / Word::kTerms;
  const int64_t panels = row_panels(block.rows);
  uint32_t *panel_of_b = scratch, *packed_a = scratch + panel_words<T>(kPanelColumns);
  for (int64_t k = 0; k < block.depth; k += Word::kChunk)
    for (int64_t panel = 0; panel < panels; ++panel)
      pack_panel<Word>(block.a, panel * kPanelRows, least(block.rows - panel * kPanelRows, kPanelRows), k,
                       least(block.depth - k, Word::kChunk), kPanelRows,
                       packed_a + (k / Word::kChunk * panels + panel) * kPanelWords);
  for (int64_t n = 0; n < block.columns; n += kPanelColumns) {
    for (int64_t k = 0; k < block.depth; k += Word::kChunk) {
      const int64_t terms = least(block.depth - k, Word::kChunk);
      const uint32_t* b = panel_of_b;
      if (block.packed_b)
        b = block.packed_b + packed_words_before<T>(n, block.depth) + kPanelColumns * Word::words(k);
      else
        pack_columns<Word>(block.b, n, block.columns - n, k, terms, panel_of_b);
      for (int64_t panel = 0; panel < panels; ++panel)
        multiply_rows<Word>(least(block.rows - panel * kPanelRows, kPanelRows),
                            packed_a + (k / Word::kChunk * panels + panel) * kPanelWords, b, Word::words(terms),
                            block.place(panel * kPanelRows, n, k, k + terms == block.depth),
                            least(block.columns - n, kPanelColumns));
    }
  }
}

// How many rows are few: all their terms, packed, take no more room than one chunk of so many columns.
template <class T>
MINIRL_INLINE int64_t few_rows(int64_t columns, int64_t depth) {
  const int64_t chunk = WordOf<T>::type::kChunk, chunks = (depth + chunk - 1) / chunk;
  return (columns - kPanelColumns) / (chunks * kPanelRows) * kPanelRows;
}
// With columns that were packed before, that many at a time.
constexpr int64_t kPackedColumns = 512;
template <class T>
MINIRL_INLINE int64_t rows_at_once(int64_t depth) {
  const int64_t few = few_rows<T>(kPackedColumns, depth);
  return few < kPanelRows ? kPanelRows : few;
}
// Words of scratch for them.
template <class T>
MINIRL_INLINE int64_t scratch_words_packed(int64_t depth) {
  typedef typename WordOf<T>::type Word;
  return panel_words<T>(kPanelColumns) + rows_at_once<T>(depth) * (Word::words(depth) + Word::kChunk) + kLanes;
}

template <class T>
static void multiply_block(const Block<T>& block, uint32_t* scratch) {
  if (block.depth == 0) return;
  if (block.packed_b) {
    const int64_t rows = rows_at_once<T>(block.depth);
    for (int64_t m = 0; m < block.rows; m += rows) multiply_few_rows(block.some_rows(m, rows), scratch);
  } else if (block.rows <= few_rows<T>(block.columns, block.depth) && block.b.term_stride == 1 && !block.b.term_index) {
    multiply_few_rows(block, scratch);
  } else {
    multiply_many_rows(block, scratch);
  }
}

}  // namespace
