// The tiles of AMX: sixteen rows of sixteen words of 32 bits, each a pair of bfloat16.
//
// A product of two tiles adds two sums to every float32 of a third tile: one over the first terms of the pairs, one
// over the second terms. Each sum is a chain of fused multiply-adds from 0. Subnormals count as 0.
#pragma once
#include "cpu/lanes.h"

#if defined(__AMX_BF16__)
namespace {

constexpr int kTileRows = 16, kTileWords = 16;

// Tiles belong to one thread and hold values from open to close. Both calls cost some hundred cycles.
MINIRL_INLINE void open_tiles() {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}
MINIRL_INLINE void close_tiles() { _tile_release(); }

// out = from + a b for kDown by kAcross tiles, or a b where `from` is null. A step is sixteen words. For each step `a`
// has two consecutive tiles, whatever kDown is, and `b` has sixteen rows `b_stride` words apart, with its tiles side by
// side.
template <int kDown, int kAcross>
static void multiply_tiles(const uint32_t* a, const uint32_t* b, int64_t b_stride, int64_t words, const float* from,
                           int64_t from_stride, float* out, int64_t out_stride) {
  const int64_t from_bytes = from_stride * sizeof(float), out_bytes = out_stride * sizeof(float);
  const int64_t b_bytes = b_stride * sizeof(uint32_t);
  if (from) {
    _tile_loadd(0, from, from_bytes);
    if (kAcross > 1) _tile_loadd(1, from + kTileWords, from_bytes);
    if (kDown > 1) _tile_loadd(2, from + kTileRows * from_stride, from_bytes);
    if (kDown > 1 && kAcross > 1) _tile_loadd(3, from + kTileRows * from_stride + kTileWords, from_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < words; k += kTileWords) {
    const uint32_t* const rows = a + k * 2 * kTileRows;
    const uint32_t* const columns = b + k * b_stride;
    // `b` is streamed, so that it does not push `a` out of the first-level cache
    _tile_loadd(4, rows, 64);
    if (kDown > 1) _tile_loadd(5, rows + kTileRows * kTileWords, 64);
    _tile_stream_loadd(6, columns, b_bytes);
    if (kAcross > 1) _tile_stream_loadd(7, columns + kTileWords, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kAcross > 1) _tile_dpbf16ps(1, 4, 7);
    if (kDown > 1) _tile_dpbf16ps(2, 5, 6);
    if (kDown > 1 && kAcross > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, out_bytes);
  if (kAcross > 1) _tile_stored(1, out + kTileWords, out_bytes);
  if (kDown > 1) _tile_stored(2, out + kTileRows * out_stride, out_bytes);
  if (kDown > 1 && kAcross > 1) _tile_stored(3, out + kTileRows * out_stride + kTileWords, out_bytes);
}

}  // namespace
#endif
