// Pages of large outputs are given back where they turn out not to be needed.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace minirl {

#ifdef __linux__
// The whole ones within; says whether there are any, which is then done.
inline bool release_whole_pages(uintptr_t begin, int64_t bytes, uintptr_t page) {
  const uintptr_t first = (begin + page - 1) & ~(page - 1), last = (begin + bytes) & ~(page - 1);
  return first < last && madvise((void*)first, last - first, MADV_DONTNEED) == 0;
}
#endif

// For memory of an allocator that nobody reads again: it stays the owner's, without pages until it is written to.
inline void release_pages(uintptr_t begin, int64_t bytes) {
#ifdef __linux__
  release_whole_pages(begin, bytes, (uintptr_t)sysconf(_SC_PAGESIZE));
#endif
}

// Where there are many, whole pages are released: they read as zeros, and those that nobody has touched need not be.
inline void write_zeros(void* begin, int64_t bytes) {
  constexpr int64_t kMany = int64_t{1} << 20;
#ifdef __linux__
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  if (bytes >= kMany && release_whole_pages((uintptr_t)begin, bytes, page)) {
    // what is left at either end is less than a page; the neighbours of the whole pages may be zeroed twice
    memset(begin, 0, page);
    memset((char*)begin + bytes - page, 0, page);
    return;
  }
#endif
  memset(begin, 0, bytes);
}

}  // namespace minirl
