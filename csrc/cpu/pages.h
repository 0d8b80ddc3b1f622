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

// Where there are many, whole pages are released: they read as zeros, and those that nobody has touched need not be.
inline void write_zeros(void* begin, int64_t bytes) {
  constexpr int64_t kMany = int64_t{1} << 20;
#ifdef __linux__
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)begin, last = first + bytes;
  const uintptr_t inner = (first + page - 1) & ~(page - 1), inner_end = last & ~(page - 1);
  if (bytes >= kMany && madvise((void*)inner, inner_end - inner, MADV_DONTNEED) == 0) {
    memset(begin, 0, inner - first);
    memset((void*)inner_end, 0, last - inner_end);
    return;
  }
#endif
  memset(begin, 0, bytes);
}

}  // namespace minirl
