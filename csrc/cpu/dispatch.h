// One kernel, compiled once per instruction set, and the choice between them.
//
// A source in cpu/ defines `void MINIRL_KERNEL(name)(const Args&, int64_t begin, int64_t end)` for rows
// [begin, end). Its header declares it with MINIRL_DECLARE_KERNEL(name, Args). MINIRL_PICK(name, Args) is the one to
// run. Instructions that multiply pairs of bfloat16 serve products of matrices alone: only the sources that include
// gemm.h are compiled for them, and MINIRL_PICK_PRODUCT picks their kernels. The other kernels are then AVX-512's.
#pragma once
#include <stdint.h>

#define MINIRL_JOIN_(a, b) a##_##b
#define MINIRL_JOIN(a, b) MINIRL_JOIN_(a, b)
#define MINIRL_KERNEL(name) MINIRL_JOIN(name, MINIRL_ISA)

// The tables of this build, best last; the definitions come from CMakeLists.txt.
#ifdef MINIRL_HAVE_AVX2
#define MINIRL_FOR_EACH_ISA(DO) DO(baseline) DO(avx2) DO(avx512) DO(avx512bf16) DO(amx)
#else
#define MINIRL_FOR_EACH_ISA(DO) DO(baseline)
#endif

#define MINIRL_DECLARE_KERNEL(name, Args)                \
  void name##_baseline(const Args&, int64_t, int64_t);   \
  void name##_avx2(const Args&, int64_t, int64_t);       \
  void name##_avx512(const Args&, int64_t, int64_t);     \
  void name##_avx512bf16(const Args&, int64_t, int64_t); \
  void name##_amx(const Args&, int64_t, int64_t);

namespace minirl {

template <class Args>
using Kernel = void (*)(const Args&, int64_t begin, int64_t end);

// Index of the instruction set in use, in the order of MINIRL_FOR_EACH_ISA.
int picked_isa();

}  // namespace minirl

#ifdef MINIRL_HAVE_AVX2
#define MINIRL_TABLE(name) {name##_baseline, name##_avx2, name##_avx512, name##_avx512, name##_avx512}
#define MINIRL_PRODUCT_TABLE(name) {name##_baseline, name##_avx2, name##_avx512, name##_avx512bf16, name##_amx}
#else
#define MINIRL_TABLE(name) {name##_baseline}
#define MINIRL_PRODUCT_TABLE(name) MINIRL_TABLE(name)
#endif
#define MINIRL_PICK_OF(table, Args)                     \
  ([] {                                                 \
    static const minirl::Kernel<Args> kTable[] = table; \
    return kTable[minirl::picked_isa()];                \
  }())
#define MINIRL_PICK(name, Args) MINIRL_PICK_OF(MINIRL_TABLE(name), Args)
#define MINIRL_PICK_PRODUCT(name, Args) MINIRL_PICK_OF(MINIRL_PRODUCT_TABLE(name), Args)
