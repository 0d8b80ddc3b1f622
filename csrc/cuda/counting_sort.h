// The counting sort on a GPU.
#pragma once
#include "common/counting_sort.h"

namespace minirl {

constexpr int64_t kMostSegments = 1024;  // threads of a block

// Puts the sort on the stream of the current device, which owns all pointers. Returns CUDA's error text, or null.
const char* launch_counting_sort(const CountingSort& sort, void* stream);

}  // namespace minirl
