// A stable sort of items by small keys, without atomics: three phases with a barrier after each.
//
// The items are cut into segments, one for each worker. A worker counts the keys of its segment; then one of them turns
// the counts into places; then each puts its segment in order. The result does not depend on the number of segments.
#pragma once
#include <stdint.h>

#include "common/shared.h"

namespace minirl {

struct CountingSort {
  const int64_t* keys;  // [items], from 0 to num_keys - 1
  int64_t items, num_keys, segments;
  int64_t* places;  // [segments, num_keys] of scratch: counts, then where the next item of a key goes
  int64_t* begins;  // [num_keys + 1]: where each key's items begin
  int64_t* order;   // [items]: the items by key, those of one key in the order they had
};

MINIRL_SHARED int64_t segment_begin(const CountingSort& sort, int64_t segment) {
  const int64_t whole = sort.items / sort.segments, rest = sort.items % sort.segments;
  return segment * whole + (segment < rest ? segment : rest);
}

MINIRL_SHARED void count_segment(const CountingSort& sort, int64_t segment) {
  int64_t* const counts = sort.places + segment * sort.num_keys;
  for (int64_t key = 0; key < sort.num_keys; ++key) counts[key] = 0;
  for (int64_t item = segment_begin(sort, segment); item < segment_begin(sort, segment + 1); ++item)
    ++counts[sort.keys[item]];
}

MINIRL_SHARED void places_of_counts(const CountingSort& sort) {
  int64_t next = 0;
  for (int64_t key = 0; key < sort.num_keys; ++key) {
    sort.begins[key] = next;
    for (int64_t segment = 0; segment < sort.segments; ++segment) {
      int64_t& place = sort.places[segment * sort.num_keys + key];
      const int64_t count = place;
      place = next;
      next += count;
    }
  }
  sort.begins[sort.num_keys] = next;
}

MINIRL_SHARED void order_segment(const CountingSort& sort, int64_t segment) {
  int64_t* const places = sort.places + segment * sort.num_keys;
  for (int64_t item = segment_begin(sort, segment); item < segment_begin(sort, segment + 1); ++item)
    sort.order[places[sort.keys[item]]++] = item;
}

}  // namespace minirl
