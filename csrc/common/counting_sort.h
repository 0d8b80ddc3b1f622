// A stable sort of items by small keys, without atomics: phases with a barrier after each.
//
// The items are cut into segments, one for each worker. The phases:
//   0. Each worker counts the keys of its segment.
//   1. Each worker takes some of the keys, and turns their counts in all segments into places.
//   2. One worker finds where each key begins.
//   3. Each worker puts the items of its segment in order.
// The result does not depend on the number of segments.
#pragma once
#include <stdint.h>

#include "common/shared.h"

namespace minirl {

struct CountingSort {
  const int64_t* keys;  // [items], from 0 to num_keys - 1; any other key counts as the last one
  int64_t items, num_keys, segments;
  int64_t* places;  // [segments, num_keys] of scratch: counts; then how many items of a key precede its next one
  int64_t* begins;  // [num_keys + 1]: where each key's items begin
  int64_t* order;   // [items]: the items by key; items of one key keep their order
};

MINIRL_SHARED int64_t key_of(const CountingSort& sort, int64_t item) {
  const int64_t key = sort.keys[item], last = sort.num_keys - 1;
  return key < 0 || key > last ? last : key;
}

MINIRL_SHARED int64_t segment_begin(const CountingSort& sort, int64_t segment) {
  const int64_t whole = sort.items / sort.segments, rest = sort.items % sort.segments;
  return segment * whole + (segment < rest ? segment : rest);
}

MINIRL_SHARED void count_segment(const CountingSort& sort, int64_t segment) {
  int64_t* const counts = sort.places + segment * sort.num_keys;
  for (int64_t key = 0; key < sort.num_keys; ++key) counts[key] = 0;
  for (int64_t item = segment_begin(sort, segment); item < segment_begin(sort, segment + 1); ++item)
    ++counts[key_of(sort, item)];
}

// Until begin_keys, begins[key + 1] is the number of the key's items.
MINIRL_SHARED void place_key(const CountingSort& sort, int64_t key) {
  int64_t next = 0;
  for (int64_t segment = 0; segment < sort.segments; ++segment) {
    int64_t& place = sort.places[segment * sort.num_keys + key];
    const int64_t count = place;
    place = next;
    next += count;
  }
  sort.begins[key + 1] = next;
}

MINIRL_SHARED void begin_keys(const CountingSort& sort) {
  sort.begins[0] = 0;
  for (int64_t key = 0; key < sort.num_keys; ++key) sort.begins[key + 1] += sort.begins[key];
}

MINIRL_SHARED void order_segment(const CountingSort& sort, int64_t segment) {
  int64_t* const places = sort.places + segment * sort.num_keys;
  for (int64_t item = segment_begin(sort, segment); item < segment_begin(sort, segment + 1); ++item) {
    const int64_t key = key_of(sort, item);
    sort.order[sort.begins[key] + places[key]++] = item;
  }
}

constexpr int kSortPhases = 4;

// One worker's share of a phase; there are as many workers as segments. All workers have ended the phase before.
MINIRL_SHARED void sort_phase(const CountingSort& sort, int phase, int64_t worker) {
  if (phase == 0) count_segment(sort, worker);
  if (phase == 1)
    for (int64_t key = worker; key < sort.num_keys; key += sort.segments) place_key(sort, key);
  if (phase == 2 && worker == 0) begin_keys(sort);
  if (phase == 3) order_segment(sort, worker);
}

}  // namespace minirl
