// Large outputs ask for huge pages before they are first touched, as page faults can cost more than the kernel; and
// give back those that they turn out not to need.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace minirl {

#ifdef __linux__
// On the whole pages of `page` bytes within; says whether that was done.
inline bool advise(uintptr_t begin, int64_t bytes, uintptr_t page, int advice) {
  const uintptr_t first = (begin + page - 1) & ~(page - 1), last = (begin + bytes) & ~(page - 1);
  return first < last && madvise((void*)first, last - first, advice) == 0;
}
#endif

inline void advise_huge_pages(uintptr_t begin, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  // where the kernel does not take it, the pages are small and nothing else changes
  advise(begin, bytes, uintptr_t{2} << 20, MADV_HUGEPAGE);
#endif
}

// For memory of an allocator that nobody reads again: it stays the owner's, without pages until it is written to.
inline void release_pages(uintptr_t begin, int64_t bytes) {
#ifdef __linux__
  advise(begin, bytes, (uintptr_t)sysconf(_SC_PAGESIZE), MADV_DONTNEED);
#endif
}

// Where there are many, whole pages are released: they read as zeros, and those that nobody has touched need not be.
inline void write_zeros(void* begin, int64_t bytes) {
  constexpr int64_t kMany = int64_t{1} << 20;
#ifdef __linux__
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  if (bytes >= kMany && advise((uintptr_t)begin, bytes, page, MADV_DONTNEED)) {
    // what is left at either end is less than a page; the neighbours of the whole pages may be zeroed twice
    memset(begin, 0, page);
    memset((char*)begin + bytes - page, 0, page);
    return;
  }
#endif
  memset(begin, 0, bytes);
}

}  // namespace minirl
