#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#ifdef MINIRL_HAVE_AVX2
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/isa.h"

namespace minirl {
namespace {

#define MINIRL_NAME(isa) #isa,
const char* const kNames[] = {MINIRL_FOR_EACH_ISA(MINIRL_NAME)};
#undef MINIRL_NAME
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

#ifdef MINIRL_HAVE_AVX2
// AMX with bfloat16. Linux lets a process use it only after a request.
bool may_use_tiles() {
#ifdef __linux__
  unsigned a, b, c, d;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBFloat16) || !(d & kTiles)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h, from Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool runs_here(int isa) {
#ifdef MINIRL_HAVE_AVX2
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const bool runs[] = {true, avx2, avx512, bfloat16, bfloat16 && may_use_tiles()};
  return runs[isa];
#else
  return isa == 0;
#endif
}

int index_of(const std::string& name, const std::string& what) {
  std::string choices;
  for (int isa = 0; isa < kCount; ++isa) {
    if (!runs_here(isa)) continue;
    if (name == kNames[isa]) return isa;
    choices += (choices.empty() ? "" : ", ") + std::string(kNames[isa]);
  }
  throw std::invalid_argument(what + " is '" + name +
                              "': it must be one that this build has and this processor runs: " + choices);
}

int best_isa() {
  if (const char* wanted = std::getenv("MINIRL_ISA"); wanted && *wanted) return index_of(wanted, "MINIRL_ISA");
  int best = 0;
  for (int isa = 0; isa < kCount; ++isa)
    if (runs_here(isa)) best = isa;
  return best;
}

int& current() {
  static int isa = best_isa();
  return isa;
}

}  // namespace

int picked_isa() { return current(); }

std::string isa_name() { return kNames[current()]; }

void set_isa(const std::string& name) { current() = index_of(name, "name"); }

std::vector<std::string> isa_built() { return {kNames, kNames + kCount}; }

std::vector<std::string> isa_supported() {
  std::vector<std::string> names;
  for (int isa = 0; isa < kCount; ++isa)
    if (runs_here(isa)) names.emplace_back(kNames[isa]);
  return names;
}

}  // namespace minirl
