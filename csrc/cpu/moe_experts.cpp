// The phases of a mixture of experts, forward and backward.
#include "cpu/moe_experts.h"

#include "cpu/functions.h"
#include "cpu/gemm.h"

namespace minirl {
namespace {

// The first n lanes; the others become 0.
MINIRL_INLINE Floats keep_first(Floats v, int64_t n) {
  float a[kLanes];
  store(a, v);
  for (int64_t i = n; i < kLanes; ++i) a[i] = 0.f;
  return load(a);
}

// A thread's memory for blocks of up to `columns`: packed operands, and a block of results. A destructor would bring a
// weak symbol for exceptions.
struct Scratch {
  uint32_t* words;
  float* results;
};
MINIRL_INLINE void* allocate(int64_t words) { return aligned_alloc(64, (words + 15) / 16 * 64); }
template <class T>
MINIRL_INLINE Scratch scratch_for(int64_t columns, int64_t packed_depth = 0) {
  int64_t words = scratch_words<T>(columns);
  if (packed_depth > 0 && words < scratch_words_packed<T>(packed_depth)) words = scratch_words_packed<T>(packed_depth);
  return {(uint32_t*)allocate(words), (float*)allocate(kExpertRows * columns)};
}
MINIRL_INLINE void release(Scratch scratch) {
  free(scratch.words);
  free(scratch.results);
}

template <class T>
MINIRL_INLINE const T* matrix_of(const ExpertWeight& weight, int64_t expert) {
  return (const T*)weight.data + expert * weight.expert_stride;
}

template <class T>
MINIRL_INLINE void up(const T*, const ExpertsUp& args, int64_t begin, int64_t end) {
  const int64_t width = args.intermediate_size, depth = args.hidden_size;
  const ExpertWeight& weight = args.gate_up_proj;
  const Scratch scratch = scratch_for<T>(2 * kActivationColumns, weight.packed ? depth : 0);
  int64_t lanes[2 * kActivationColumns];  // columns of the gate, then the same of up
  for (int64_t index = begin; index < end; ++index) {
    const RowBlock& block = args.rows.blocks[index % args.rows.num_blocks];
    const int64_t c = index / args.rows.num_blocks * kActivationColumns, n = least(width - c, kActivationColumns);
    const Operand<T> x = {(const T*)args.hidden, args.hidden_stride, 1, 0, args.rows.tokens + block.first};
    if (weight.packed) {
      for (int64_t half = 0; half < 2; ++half) {
        Block<T> product = {x, {}, scratch.results + half * n, 2 * n, block.rows, n, depth, false};
        product.packed_b = (const uint32_t*)weight.data + block.expert * weight.expert_stride +
                           half * packed_words<T>(width, depth) + packed_words_before<T>(c, depth);
        multiply_block<T>(product, scratch.words);
      }
    } else {
      for (int64_t j = 0; j < n; ++j) lanes[j] = c + j, lanes[n + j] = width + c + j;
      multiply_block<T>({x,
                         {matrix_of<T>(weight, block.expert), weight.row_stride, 1, 0, lanes},
                         scratch.results,
                         2 * n,
                         block.rows,
                         2 * n,
                         depth,
                         false},
                        scratch.words);
    }
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t row = block.first + i;
      const float* const gates = scratch.results + i * 2 * n;
      T* const kept = args.gate_up ? (T*)args.gate_up + row * 2 * width + c : nullptr;
      for (int64_t j = 0; j < n; j += kLanes) {
        const int64_t count = least(n - j, kLanes);
        const Floats gate = load_first(gates + j, count), value = load_first(gates + n + j, count);
        store_first((T*)args.activation + row * width + c + j, gate * sigmoids(gate).value * value, count);
        if (kept) {
          store_first(kept + j, gate, count);
          store_first(kept + width + j, value, count);
        }
      }
    }
  }
  release(scratch);
}

template <class T>
MINIRL_INLINE void activation_grad(const T*, const ExpertsActivationGrad& args, int64_t begin, int64_t end) {
  const int64_t width = args.intermediate_size, parts = (width + kActivationColumns - 1) / kActivationColumns;
  const Scratch scratch = scratch_for<T>(kActivationColumns);
  for (int64_t index = begin; index < end; ++index) {
    const RowBlock& block = args.rows.blocks[index % args.rows.num_blocks];
    const int64_t part = index / args.rows.num_blocks, c = part * kActivationColumns;
    const int64_t n = least(width - c, kActivationColumns);
    if (args.weight_grad_parts || args.gate_up_grad)
      multiply_block<T>({{(const T*)args.grad_out, args.hidden_size, 1, 0, args.rows.tokens + block.first},
                         {matrix_of<T>(args.down_proj, block.expert) + c, 1, args.down_proj.row_stride, width - c},
                         scratch.results,
                         kActivationColumns,
                         block.rows,
                         n,
                         args.hidden_size,
                         false},
                        scratch.words);
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t row = block.first + i;
      const Floats weight = splat(args.weights[args.rows.pairs[row]]);
      const T* const gates = (const T*)args.gate_up + row * 2 * width + c;
      Floats sum = splat(0.f);
      for (int64_t j = 0; j < n; j += kLanes) {
        const int64_t count = least(n - j, kLanes);
        const Floats gate = load_first(gates + j, count), value = load_first(gates + width + j, count);
        const Sigmoids s = sigmoids(gate);
        const Floats silu = gate * s.value;
        if (args.weighted) store_first((T*)args.weighted + row * width + c + j, silu * value * weight, count);
        const Floats upstream = load(scratch.results + i * kActivationColumns + j);
        if (args.gate_up_grad) {
          const Floats grad = upstream * weight, slope = s.value * (splat(1.f) + gate * s.complement);
          T* const out = (T*)args.gate_up_grad + row * 2 * width + c + j;
          store_first(out, grad * value * slope, count);
          store_first(out + width, grad * silu, count);
        }
        if (args.weight_grad_parts) sum = sum + keep_first(silu * value * upstream, count);
      }
      if (args.weight_grad_parts) args.weight_grad_parts[row * parts + part] = sum_lanes(sum);
    }
  }
  release(scratch);
}

template <class T>
MINIRL_INLINE void product(const T*, const ExpertsProduct& args, int64_t begin, int64_t end) {
  const Scratch scratch = scratch_for<T>(kExpertColumns, args.packed ? args.depth : 0);
  for (int64_t index = begin; index < end; ++index) {
    const RowBlock& block = args.rows.blocks[index % args.rows.num_blocks];
    const int64_t c = index / args.rows.num_blocks * kExpertColumns;
    Block<T> product = {{(const T*)args.x + block.first * args.depth, args.depth, 1, block.rows},
                        {},
                        args.out + block.first * args.columns + c,
                        args.columns,
                        block.rows,
                        least(args.columns - c, kExpertColumns),
                        args.depth,
                        false};
    if (args.packed)
      product.packed_b =
          (const uint32_t*)args.matrix + block.expert * args.expert_stride + packed_words_before<T>(c, args.depth);
    else
      product.b = {(const T*)args.matrix + block.expert * args.expert_stride + c * args.column_stride,
                   args.column_stride, args.depth_stride, args.columns - c};
    multiply_block<T>(product, scratch.words);
  }
  release(scratch);
}

template <class T>
MINIRL_INLINE void count_words(const T*, const ExpertsPackedWords& args, int64_t, int64_t) {
  *args.words = packed_words<T>(args.rows, args.columns);
}

template <class T>
MINIRL_INLINE void pack(const T*, const ExpertsPack& args, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index % args.parts * args.rows;
    const T* const matrix = matrix_of<T>(args.weight, index / args.parts) + first * args.weight.row_stride;
    pack_matrix<T>({matrix, args.weight.row_stride, 1, args.rows}, args.rows, args.columns,
                   args.out + index * packed_words<T>(args.rows, args.columns));
  }
}

template <class T>
MINIRL_INLINE void combine(const T*, const ExpertsCombine& args, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t* const rows = args.row_of_pair + token * args.top_k;
    const float* const weights = args.weights ? args.weights + token * args.top_k : nullptr;
    T* const out = (T*)args.out + token * args.hidden_size;
    for (int64_t j = 0; j < args.hidden_size; j += kLanes) {
      const int64_t count = least(args.hidden_size - j, kLanes);
      Floats sum = splat(0.f);
      for (int64_t k = 0; k < args.top_k; ++k) {
        const Floats y = load_first(args.y + rows[k] * args.hidden_size + j, count);
        sum = sum + (weights ? y * splat(weights[k]) : y);
      }
      store_first(out + j, sum, count);
    }
  }
}

template <class T>
MINIRL_INLINE Operand<T> columns_of(const ExpertsWeightGrad::Side& side, const ExpertRows& rows, int64_t first,
                                    int64_t column) {
  const T* const data = (const T*)side.data + column;
  if (side.of_tokens) return {data, 1, side.stride, side.columns - column, nullptr, rows.tokens + first};
  return {data + first * side.stride, 1, side.stride, side.columns - column};
}

// Float32 is summed in place. 16-bit dtypes are summed in scratch if they have more than one chunk, and rounded once.
// Rows are written whole, one piece after another, while their new pages are still in a cache.
template <class T>
MINIRL_INLINE void weight_grad(const T*, const ExpertsWeightGrad& args, int64_t begin, int64_t end) {
  constexpr bool in_place = sizeof(T) == sizeof(float);
  const int64_t rows = args.left.columns, columns = args.right.columns;
  const int64_t across = (columns + kExpertColumns - 1) / kExpertColumns;
  const Scratch scratch = scratch_for<T>(kExpertColumns);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index % across * kExpertColumns, expert = index / across % args.num_experts;
    const int64_t m = index / across / args.num_experts * kExpertRows;
    const int64_t first = args.rows.begins[expert], depth = args.rows.begins[expert + 1] - first;
    T* const out = (T*)args.out + (expert * rows + m) * columns + n;
    multiply_block<T>(
        {columns_of<T>(args.left, args.rows, first, m), columns_of<T>(args.right, args.rows, first, n),
         in_place ? (float*)out : scratch.results, in_place ? columns : kExpertColumns, least(rows - m, kExpertRows),
         least(columns - n, kExpertColumns), depth, false, in_place ? nullptr : out, columns},
        scratch.words);
  }
  release(scratch);
}

}  // namespace

void MINIRL_KERNEL(experts_up)(const ExpertsUp& args, int64_t begin, int64_t end) {
  with_float(args.rows.dtype, [&](auto* type) __attribute__((always_inline)) { up(type, args, begin, end); });
}
void MINIRL_KERNEL(experts_activation_grad)(const ExpertsActivationGrad& args, int64_t begin, int64_t end) {
  with_float(args.rows.dtype,
             [&](auto* type) __attribute__((always_inline)) { activation_grad(type, args, begin, end); });
}
void MINIRL_KERNEL(experts_product)(const ExpertsProduct& args, int64_t begin, int64_t end) {
  with_float(args.rows.dtype, [&](auto* type) __attribute__((always_inline)) { product(type, args, begin, end); });
}
void MINIRL_KERNEL(experts_packed_words)(const ExpertsPackedWords& args, int64_t begin, int64_t end) {
  with_float(args.dtype, [&](auto* type) __attribute__((always_inline)) { count_words(type, args, begin, end); });
}
void MINIRL_KERNEL(experts_pack)(const ExpertsPack& args, int64_t begin, int64_t end) {
  with_float(args.dtype, [&](auto* type) __attribute__((always_inline)) { pack(type, args, begin, end); });
}
void MINIRL_KERNEL(experts_combine)(const ExpertsCombine& args, int64_t begin, int64_t end) {
  with_float(args.dtype, [&](auto* type) __attribute__((always_inline)) { combine(type, args, begin, end); });
}
void MINIRL_KERNEL(experts_weight_grad)(const ExpertsWeightGrad& args, int64_t begin, int64_t end) {
  with_float(args.rows.dtype, [&](auto* type) __attribute__((always_inline)) { weight_grad(type, args, begin, end); });
}

}  // namespace minirl
