// The counting sort by one block of threads, one segment per thread. It is one launch; a radix sort takes several.
#include "cuda/counting_sort.h"

#include <cuda_runtime.h>

namespace minirl {
namespace {

__global__ void counting_sort_kernel(CountingSort sort) {
  for (int phase = 0; phase < kSortPhases; ++phase) {
    sort_phase(sort, phase, threadIdx.x);
    __syncthreads();
  }
}

}  // namespace

const char* launch_counting_sort(const CountingSort& sort, void* stream) {
  counting_sort_kernel<<<1, (unsigned)sort.segments, 0, (cudaStream_t)stream>>>(sort);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace minirl
