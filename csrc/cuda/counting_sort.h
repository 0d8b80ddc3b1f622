// The counting sort on a GPU.
#pragma once
#include "common/counting_sort.h"

namespace minirl {

constexpr int64_t kMostSegments = 1024;  // threads of a block

// Puts it on the stream, for the device that is current; all pointers are of that device. Returns what went wrong, or
// null.
const char* launch_counting_sort(const CountingSort& sort, void* stream);

}  // namespace minirl
