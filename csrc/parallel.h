// Rows over torch's own thread pool, through the C symbol torch_parallel_for. Python passes the address of that symbol.
#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace minirl {

typedef int (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);

// Serial until Python has found the symbol: a torch older than 2.10 has none.
inline ParallelFor g_parallel_for = nullptr;

// A piece of fewer elements costs less than handing it to another thread.
constexpr int64_t kMinElementsPerThread = 16384;

template <class Args>
void parallel_rows(int64_t rows, int64_t elements_per_row, Kernel<Args> kernel, const Args& args) {
  if (!g_parallel_for) return kernel(args, 0, rows);
  struct Job {
    Kernel<Args> kernel;
    const Args& args;
  } job{kernel, args};
  const int64_t grain = kMinElementsPerThread / (elements_per_row > 0 ? elements_per_row : 1) + 1;
  g_parallel_for(
      0, rows, grain,
      [](int64_t begin, int64_t end, void* context) {
        const Job& job = *static_cast<const Job*>(context);
        job.kernel(job.args, begin, end);
      },
      &job);
}

}  // namespace minirl
