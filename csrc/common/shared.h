// Declares the functions that the CPU kernels and CUDA share.
#pragma once

#ifdef __CUDACC__
#define MINIRL_SHARED static inline __host__ __device__
#else
#define MINIRL_SHARED static inline
#endif
