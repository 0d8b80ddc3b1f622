// Panels of an operand of the matmul (gemm.h): a few rows or columns for a chunk of the reduced dimension, packed in
// the order in which the products read them.
#pragma once
#include "cpu/lanes.h"
#include "cpu/tiles.h"

namespace {

// Accumulators of kRegisterRows rows by two vectors, and the operands of a step, fill the registers.
#if defined(__AVX512F__)
constexpr int kRegisterRows = 14;
#else
constexpr int kRegisterRows = 6;
#endif
constexpr int kPanelColumns = 2 * kNative;
constexpr int64_t kStrip = 32;

// A packed word of 32 bits: it holds `kTerms` terms of the reduced dimension, at place(k) of a chunk. Panels of rows
// have kRows rows. A chunk is summed in links of kLinkWords, since short chains of float32 products lose less.
template <class T>
struct FloatWord {
  static constexpr int kTerms = 1, kRows = kRegisterRows;
  static constexpr int64_t kChunk = 256, kLinkWords = 64;
  static int64_t place(int64_t k) { return k; }
  static int64_t words(int64_t terms) { return terms; }
};
template <>
struct FloatWord<BFloat16> {
  static constexpr int kTerms = 1, kRows = kRegisterRows;
  static constexpr int64_t kChunk = 512, kLinkWords = kChunk;
  static int64_t place(int64_t k) { return k ^ 1; }
  static int64_t words(int64_t terms) { return (terms + 1) & ~int64_t{1}; }
};
struct PairWord {
  static constexpr int kTerms = 2, kRows = kRegisterRows;
  static constexpr int64_t kChunk = 512, kLinkWords = kChunk / kTerms;
  static int64_t place(int64_t k) { return k; }
  static int64_t words(int64_t terms) { return (terms + 1) / 2; }
};
template <class T>
struct WordOf {
  typedef FloatWord<T> type;
};
#if defined(__AMX_BF16__)
// Pairs as tiles take them: a whole number of tiles, the rest of the last tile 0. A chunk continues the sum so far, so
// that its length changes no bit.
struct TileWord : PairWord {
  static constexpr int kRows = 2 * kTileRows;
  static int64_t words(int64_t terms) { return (terms + 2 * kTileWords - 1) / (2 * kTileWords) * kTileWords; }
};
template <>
struct WordOf<BFloat16> {
  typedef TileWord type;
};
#elif defined(__AVX512BF16__)
template <>
struct WordOf<BFloat16> {
  typedef PairWord type;
};
#endif

MINIRL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

MINIRL_INLINE void store_words(uint32_t* p, Ints v) {
  MINIRL_EACH_PART memcpy(p + i * kNative, &v.part[i], sizeof v.part[i]);
}

// Sixteen words along the reduced dimension, from `p` on.
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

// Lane j of words[i] becomes lane i of words[j].
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

// An operand. The lanes of the left operand are rows of the output, the lanes of the right one are its columns; terms
// are summed over. An index says where lanes or terms lie, so that gathered ones are copied only by the packing.
template <class T>
struct Operand {
  const T* data;
  int64_t lane_stride, term_stride;     // in elements; one is 1: term_stride with a lane_index, lane_stride with a
                                        // term_index
  int64_t readable;                     // with lane_stride 1, how many lanes lie side by side from the first one on
  const int64_t* lane_index = nullptr;  // of each lane; null: lane i is the i-th
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

// Packs a panel of an operand for one chunk: `terms` from `term` on, of `lanes` from `lane` on. Word k of lane i goes
// to out[k * width + i]. Sixteen words are written at a time, so `out` needs room for sixteen words more.
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

// Packs a panel of rows for one chunk, as multiply_rows reads it.
template <class Word, class T>
MINIRL_INLINE void pack_rows(Word, const Operand<T>& a, int64_t row, int64_t rows, int64_t term, int64_t terms,
                             uint32_t* out) {
  pack_panel<Word>(a, row, rows, term, terms, Word::kRows, out);
}
#if defined(__AMX_BF16__)
// Packs tiles of `a`, as multiply_tiles reads them. Words below the last row are not written.
static void pack_rows(TileWord, const Operand<BFloat16>& a, int64_t row, int64_t rows, int64_t term, int64_t terms,
                      uint32_t* out) {
  constexpr int64_t kTile = kTileRows * kTileWords, kGroup = kTileWords * TileWord::kTerms;
  const bool along = a.term_stride == 1 && !a.term_index;
  for (int64_t tile = 0; tile * kTileRows < rows; ++tile) {
    const int64_t first = row + tile * kTileRows, lanes = least(rows - tile * kTileRows, kTileRows);
    uint32_t* const to = out + tile * kTile;
    for (int64_t i = 0; along && i < lanes; ++i) {
      const BFloat16* const from = a.at(first + i, term);
      for (int64_t k = 0; k < terms; k += kGroup) {
        BFloat16 padded[kGroup] = {};
        if (terms - k < kGroup) memcpy(padded, from + k, (terms - k) * sizeof *from);
        store_words(to + k / kGroup * 2 * kTile + i * kTileWords,
                    words_along(TileWord{}, terms - k < kGroup ? padded : from + k));
      }
    }
    for (int64_t k = 0; !along && k < terms; k += kGroup) {
      Ints square[kLanes];
      pack_panel<TileWord>(a, first, lanes, term + k, least(terms - k, kGroup), kLanes, (uint32_t*)square);
      transpose(square);
      for (int64_t i = 0; i < kTileRows; ++i) store_words(to + k / kGroup * 2 * kTile + i * kTileWords, square[i]);
    }
  }
}
#endif

}  // namespace
