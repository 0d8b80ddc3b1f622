// Gives back the pages of large outputs that are not needed.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace minirl {

#ifdef __linux__
// Releases the whole pages of a range; returns false where there are none.
inline bool release_whole_pages(uintptr_t begin, int64_t bytes, uintptr_t page) {
  const uintptr_t first = (begin + page - 1) & ~(page - 1), last = (begin + bytes) & ~(page - 1);
  return first < last && madvise((void*)first, last - first, MADV_DONTNEED) == 0;
}
#endif

// Releases pages that nobody reads again. The memory stays its owner's, and gets pages again when it is written.
inline void release_pages(uintptr_t begin, int64_t bytes) {
#ifdef __linux__
  release_whole_pages(begin, bytes, (uintptr_t)sysconf(_SC_PAGESIZE));
#endif
}

// Many zeros are made by releasing whole pages, which then read as zeros: untouched pages cost nothing.
inline void write_zeros(void* begin, int64_t bytes) {
  constexpr int64_t kMany = int64_t{1} << 20;
#ifdef __linux__
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  if (bytes >= kMany && release_whole_pages((uintptr_t)begin, bytes, page)) {
    // either end has less than a page left; parts of the released pages may be zeroed twice
    memset(begin, 0, page);
    memset((char*)begin + bytes - page, 0, page);
    return;
  }
#endif
  memset(begin, 0, bytes);
}

}  // namespace minirl
