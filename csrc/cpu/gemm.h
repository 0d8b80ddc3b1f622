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
  for (int64_t word = 0; word < words; ++word) {
    const int64_t k = Word::place(word) * Word::kTerms, last = k + Word::kTerms - 1;
    if (last < terms && x.readable - lane >= kLanes) {
      store_words(out + word * width, words_across(Word{}, x.at(lane, term + k), x.at(lane, term + last)));
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

// One chunk's share of kRows by kPanelColumns outputs.
template <class Word, int kRows>
static void multiply_panels(const uint32_t* a, const uint32_t* b, int64_t words, float* out, int64_t out_stride,
                            int64_t columns, bool add) {
  NativeFloat sum[kRows][2] = {};
  // what is added to comes from memory while the chunk is summed
  for (int i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kPanelColumns; j += 16) __builtin_prefetch(out + i * out_stride + j, 1);
  for (int64_t k = 0; k < words; ++k) {
    const NativeFloat left = *(const UnalignedFloat*)(b + k * kPanelColumns);
    const NativeFloat right = *(const UnalignedFloat*)(b + k * kPanelColumns + kNative);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      sum[i][0] = multiply_add(Word{}, a[k * kPanelRows + i], left, sum[i][0]);
      sum[i][1] = multiply_add(Word{}, a[k * kPanelRows + i], right, sum[i][1]);
    }
  }
  if (columns == kPanelColumns) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      for (int half = 0; half < 2; ++half) {
        UnalignedFloat* to = (UnalignedFloat*)(out + i * out_stride + half * kNative);
        *to = add ? *to + sum[i][half] : sum[i][half];
      }
    }
    return;
  }
  float edge[kRows][kPanelColumns];
  memcpy(edge, sum, sizeof edge);
  for (int i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float* to = out + i * out_stride + j;
      *to = add ? *to + edge[i][j] : edge[i][j];
    }
}

template <class Word, int kRows = kPanelRows>
MINIRL_INLINE void multiply_rows(int64_t rows, const uint32_t* a, const uint32_t* b, int64_t words, float* out,
                                 int64_t out_stride, int64_t columns, bool add) {
  if (rows == kRows) return multiply_panels<Word, kRows>(a, b, words, out, out_stride, columns, add);
  if constexpr (kRows > 1) multiply_rows<Word, kRows - 1>(rows, a, b, words, out, out_stride, columns, add);
}

// out[rows, columns] (+)= a[rows, depth] b[depth, columns]
template <class T>
struct Block {
  Operand<T> a, b;
  float* out;
  int64_t out_stride, rows, columns, depth;
  bool accumulate;
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

// The packed columns stay in the second-level cache while panels of rows, packed in the first, pass over them.
template <class T>
static void multiply_block(const Block<T>& block, uint32_t* scratch) {
  typedef typename WordOf<T>::type Word;
  uint32_t *packed_b = scratch, *packed_a = scratch + panel_words<T>(block.columns);
  for (int64_t k = 0; k < block.depth; k += Word::kChunk) {
    const int64_t terms = block.depth - k < Word::kChunk ? block.depth - k : Word::kChunk, words = Word::words(terms);
    const bool add = block.accumulate || k > 0;
    // Terms that lie apart are read some at a time, all columns of them: a panel's alone would each be on another page.
    // (A panel narrower than a store may only be filled from one end to the other.)
    const bool apart = block.b.term_stride != 1 || block.b.term_index;
    const int64_t strip = apart && kPanelColumns >= kLanes ? kStrip : terms;
    for (int64_t first = 0; first < terms; first += strip) {
      const int64_t some = terms - first < strip ? terms - first : strip;
      for (int64_t n = 0; n < block.columns; n += kPanelColumns) {
        for (int64_t part = 0; part < kPanelColumns && n + part < block.columns; part += kLanes) {
          const int64_t left = block.columns - n - part, lanes = left < kLanes ? left : kLanes;
          pack_panel<Word>(block.b, n + part, lanes < kPanelColumns ? lanes : kPanelColumns, k + first, some,
                           kPanelColumns, packed_b + n * words + Word::words(first) * kPanelColumns + part);
        }
      }
    }
    for (int64_t m = 0; m < block.rows; m += kPanelRows) {
      const int64_t rows = block.rows - m < kPanelRows ? block.rows - m : kPanelRows;
      pack_panel<Word>(block.a, m, rows, k, terms, kPanelRows, packed_a);
      for (int64_t n = 0; n < block.columns; n += kPanelColumns) {
        const int64_t columns = block.columns - n < kPanelColumns ? block.columns - n : kPanelColumns;
        multiply_rows<Word>(rows, packed_a, packed_b + n * words, words, block.out + m * block.out_stride + n,
                            block.out_stride, columns, add);
      }
    }
  }
}

}  // namespace
