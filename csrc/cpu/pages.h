// Large outputs ask for huge pages before they are first touched, as page faults can cost more than the kernel; and
// give back those that they turn out not to need.
#pragma once
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace minirl {

#ifdef __linux__
// On the whole pages of `page` bytes within.
inline void advise(uintptr_t begin, int64_t bytes, uintptr_t page, int advice) {
  const uintptr_t first = (begin + page - 1) & ~(page - 1), last = (begin + bytes) & ~(page - 1);
  if (first < last) madvise((void*)first, last - first, advice);
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

}  // namespace minirl
