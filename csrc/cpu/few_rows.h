// The matmul of few rows. A weight that serves a token or two is read once, in the order of its memory, and not packed.
// Columns with contiguous terms are transposed in the registers. Columns that lie side by side are added a few terms at
// a time to sums in the first-level cache.
//
// Every output is the chain of gemm.h, so its bits equal the packed matmul's. Tiles have an order of their own, so this
// file does not serve them.
#pragma once
#include "cpu/gemm.h"

namespace {

MINIRL_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
MINIRL_INLINE int64_t whole_lanes(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

// With more rows packing the columns pays.
constexpr int64_t kFewRows = 4;

// Sixteen words of sixteen columns from `k` on: words[j] has word j of each column.
template <class Word, class T>
MINIRL_INLINE void load_square(Word, const T* const* columns, int64_t k, Ints (&words)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) words[i] = words_along(Word{}, columns[i] + k);
  transpose(words);
}
#if defined(__AVX512F__)
// Loads four words at a time to their places, which does half of the transposition. The loads of one column come one
// after another: columns a power of two apart share a few sets of the first-level cache, and evict each other soon.
MINIRL_INLINE void load_square_of_words(const char* const* columns, int64_t offset, Ints (&words)[kLanes]) {
  __m512i a[4][4];
  for (int i = 0; i < 4; ++i) {
    for (int part = 0; part < 4; ++part) {
      auto at = [&](int column) __attribute__((always_inline)) {
        return _mm_loadu_si128((const __m128i*)(columns[column + i] + offset + 16 * part));
      };
      __m512i v = _mm512_castsi128_si512(at(0));
      v = _mm512_mask_broadcast_i32x4(v, 0x00f0, at(4));
      v = _mm512_mask_broadcast_i32x4(v, 0x0f00, at(8));
      a[part][i] = _mm512_mask_broadcast_i32x4(v, 0xf000, at(12));
    }
  }
  for (int part = 0; part < 4; ++part) {
    const __m512i b[] = {_mm512_unpacklo_epi32(a[part][0], a[part][1]), _mm512_unpackhi_epi32(a[part][0], a[part][1]),
                         _mm512_unpacklo_epi32(a[part][2], a[part][3]), _mm512_unpackhi_epi32(a[part][2], a[part][3])};
    words[4 * part].part[0] = (NativeInt)_mm512_unpacklo_epi64(b[0], b[2]);
    words[4 * part + 1].part[0] = (NativeInt)_mm512_unpackhi_epi64(b[0], b[2]);
    words[4 * part + 2].part[0] = (NativeInt)_mm512_unpacklo_epi64(b[1], b[3]);
    words[4 * part + 3].part[0] = (NativeInt)_mm512_unpackhi_epi64(b[1], b[3]);
  }
}
MINIRL_INLINE void load_square(FloatWord<float>, const float* const* columns, int64_t k, Ints (&words)[kLanes]) {
  load_square_of_words((const char* const*)columns, k * 4, words);
}
#if defined(__AVX512BF16__)
MINIRL_INLINE void load_square(PairWord, const BFloat16* const* columns, int64_t k, Ints (&words)[kLanes]) {
  load_square_of_words((const char* const*)columns, k * 2, words);
}
#endif
#endif

// Continues the chains of kRows rows and sixteen columns by `count` words. `a` is packed, kRows wide.
template <class Word, int kRows>
MINIRL_INLINE void multiply_square(const uint32_t* a, const Ints (&words)[kLanes], int64_t count,
                                   Floats (&sum)[kRows]) {
#pragma GCC unroll 16
  for (int64_t j = 0; j < count; ++j)
    for (int i = 0; i < kRows; ++i)
      for (int part = 0; part < kParts; ++part)
        sum[i].part[part] =
            multiply_add(Word{}, a[j * kRows + i], (NativeFloat)words[Word::place(j)].part[part], sum[i].part[part]);
}

// Adds one link, whose first terms `columns` point to. Sixteen columns at a time: the processor prefetches along few
// columns only.
template <class Word, int kRows, class T>
MINIRL_INLINE void multiply_columns(const uint32_t* a, const T* const (&columns)[kLanes], int64_t terms,
                                    Floats (&sum)[kRows]) {
  constexpr int64_t kSide = kLanes * Word::kTerms;
  Ints words[kLanes];
  int64_t k = 0;
  for (; k + kSide <= terms; k += kSide, a += kLanes * kRows) {
    load_square(Word{}, columns, k, words);
    multiply_square<Word>(a, words, kLanes, sum);
  }
  if (k == terms) return;
  T padded[kLanes][kSide] = {};
  const T* rest[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    memcpy(padded[i], columns[i] + k, (terms - k) * sizeof(T));
    rest[i] = padded[i];
  }
  load_square(Word{}, rest, 0, words);
  multiply_square<Word>(a, words, Word::words(terms - k), sum);
}

// Packs all terms of the rows; those of the chunk at term k begin at words(k) * kRows.
template <int kRows, class T>
MINIRL_INLINE void pack_few_rows(const Block<T>& block, uint32_t* out) {
  typedef typename WordOf<T>::type Word;
  for (int64_t k = 0; k < block.depth; k += Word::kChunk)
    pack_panel<Word>(block.a, 0, kRows, k, least(block.depth - k, Word::kChunk), kRows, out + Word::words(k) * kRows);
}

template <class T>
MINIRL_INLINE void store_result(const Block<T>& block, int64_t row, int64_t column, Floats sum) {
  if (block.rounded)
    store_first(block.rounded + row * block.rounded_stride + column, sum, block.columns - column);
  else
    store_first(block.out + row * block.out_stride + column, sum, block.columns - column);
}

template <int kRows, class T>
static void multiply_turned(const Block<T>& block, uint32_t* scratch) {
  typedef typename WordOf<T>::type Word;
  constexpr int64_t kLink = Word::kLinkWords * Word::kTerms;
  pack_few_rows<kRows>(block, scratch);
  for (int64_t n = 0; n < block.columns; n += kLanes) {
    Floats total[kRows];
    for (int i = 0; i < kRows; ++i) total[i] = splat(0.f);
    for (int64_t k = 0; k < block.depth; k += Word::kChunk) {
      const int64_t end = least(block.depth, k + Word::kChunk);
      Floats sum[kRows];
      for (int i = 0; i < kRows; ++i) sum[i] = splat(0.f);
      for (int64_t begin = k; begin < end; begin += kLink) {
        const T* columns[kLanes];
        // lanes beyond the last column repeat it
        for (int64_t i = 0; i < kLanes; ++i) columns[i] = block.b.at(least(n + i, block.columns - 1), begin);
        Floats link[kRows];
        for (int i = 0; i < kRows; ++i) link[i] = splat(0.f);
        multiply_columns<Word>(scratch + Word::words(begin) * kRows, columns, least(end - begin, kLink), link);
        for (int i = 0; i < kRows; ++i) sum[i] = sum[i] + link[i];
      }
      for (int i = 0; i < kRows; ++i) total[i] = total[i] + sum[i];
    }
    for (int64_t i = 0; i < kRows; ++i) store_result(block, i, n, total[i]);
  }
}

// A word of up to sixteen columns from `lane` on, which lie side by side.
template <class Word, class T>
MINIRL_INLINE Ints load_across(const Operand<T>& x, int64_t lane, int64_t lanes, int64_t term, int64_t terms,
                               int64_t word) {
  const int64_t k = Word::place(word) * Word::kTerms, last = k + Word::kTerms - 1;
  if (last < terms && x.readable - lane >= kLanes)
    return words_across(Word{}, x.at(lane, term + k), x.at(lane, term + last));
  T padded[Word::kTerms * kLanes] = {};
  for (int64_t j = 0; j < Word::kTerms && k + j < terms; ++j)
    memcpy(padded + j * kLanes, x.at(lane, term + k + j), least(lanes, kLanes) * sizeof(T));
  return words_across(Word{}, padded, padded + (Word::kTerms - 1) * kLanes);
}

// Words that are added to a sum in a register before it is stored.
constexpr int64_t kWordsAtOnce = 8;

template <int kRows, class T>
static void multiply_across(const Block<T>& block, uint32_t* scratch) {
  typedef typename WordOf<T>::type Word;
  pack_few_rows<kRows>(block, scratch);
  const int64_t width = whole_lanes(block.columns);
  float* const links = (float*)(scratch + Word::words(block.depth) * kRows + kLanes);
  float* const sums = links + kRows * width;  // of the chunk's earlier links
  for (int64_t k = 0; k < block.depth; k += Word::kChunk) {
    const int64_t terms = least(block.depth - k, Word::kChunk), words = Word::words(terms);
    const bool is_last = k + terms == block.depth;
    for (int64_t word = 0; word < words; word += kWordsAtOnce) {
      const uint32_t* const a = scratch + (Word::words(k) + word) * kRows;
      const int64_t count = least(words - word, kWordsAtOnce);
      const bool begins = word % Word::kLinkWords == 0;
      const bool ends = (word + count) % Word::kLinkWords == 0 || word + count == words;
      for (int64_t n = 0; n < block.columns; n += kLanes) {
        Floats sum[kRows];
        for (int i = 0; i < kRows; ++i) sum[i] = begins ? splat(0.f) : load(links + i * width + n);
        for (int64_t j = 0; j < count; ++j) {
          const Ints right = load_across<Word>(block.b, n, block.columns - n, k, terms, word + j);
          for (int i = 0; i < kRows; ++i)
            for (int part = 0; part < kParts; ++part)
              sum[i].part[part] =
                  multiply_add(Word{}, a[j * kRows + i], (NativeFloat)right.part[part], sum[i].part[part]);
        }
        for (int i = 0; i < kRows; ++i) {
          if (ends) sum[i] = (word < Word::kLinkWords ? splat(0.f) : load(sums + i * width + n)) + sum[i];
          store((ends ? sums : links) + i * width + n, sum[i]);
        }
      }
    }
    for (int64_t n = 0; n < block.columns; n += kLanes)
      for (int64_t i = 0; i < kRows; ++i) {
        float* const total = block.out + i * block.out_stride + n;
        Floats sum = load(sums + i * width + n);
        if (k > 0) sum = load_first(total, block.columns - n) + sum;
        if (is_last)
          store_result(block, i, n, sum);
        else
          store_first(total, sum, block.columns - n);
      }
  }
}

template <class Word>
constexpr bool kIsChain = true;
#if defined(__AMX_BF16__)
template <>
constexpr bool kIsChain<TileWord> = false;
#endif

// Whether multiply_few_rows_unpacked serves this block and is the faster way.
template <class T>
MINIRL_INLINE bool is_for_few_rows(const Block<T>& block) {
  return kIsChain<typename WordOf<T>::type> && block.rows <= kFewRows && block.depth > 0 && !block.accumulate;
}
// Words of scratch for multiply_few_rows_unpacked.
template <class T>
MINIRL_INLINE int64_t scratch_words_few_rows(int64_t columns, int64_t depth) {
  return (WordOf<T>::type::words(depth) + 2 * whole_lanes(columns)) * kFewRows + kLanes;
}
template <class T, int kRows = kFewRows>
MINIRL_INLINE void multiply_few_rows_unpacked(const Block<T>& block, uint32_t* scratch) {
  if (block.rows == kRows)
    return block.b.term_stride == 1 ? multiply_turned<kRows>(block, scratch) : multiply_across<kRows>(block, scratch);
  if constexpr (kRows > 1) multiply_few_rows_unpacked<T, kRows - 1>(block, scratch);
}

}  // namespace
