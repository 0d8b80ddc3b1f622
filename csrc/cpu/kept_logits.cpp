// Sets all but the kept logits of a row to -inf, in place, by a walk over the gaps between the kept ones.
#include "cpu/kept_logits.h"

#include "cpu/lanes.h"

namespace minirl {
namespace {

template <class T>
MINIRL_INLINE void drop(T* x, int64_t count) {
  T minus_infinity;
  store_one(&minus_infinity, -INFINITY);
  for (int64_t j = 0; j < count; ++j) x[j] = minus_infinity;
}

}  // namespace

void MINIRL_KERNEL(kept_logits)(const KeptLogits& args, int64_t begin, int64_t end) {
  with_float(args.logits.dtype, [&](auto* type) {
    for (int64_t row = begin; row < end; ++row) {
      if (args.begin[row] == args.end[row]) continue;
      auto* x = row_of(type, args.logits, row);
      int64_t gap = 0;
      for (int64_t i = args.begin[row]; i < args.end[row]; ++i) {
        const int64_t j = args.ids[i];
        if (j < gap) continue;
        if (j >= args.logits.size) break;
        drop(x + gap, j - gap);
        gap = j + 1;
      }
      drop(x + gap, args.logits.size - gap);
    }
  });
}

}  // namespace minirl
