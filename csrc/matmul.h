// Products of matrices over torch's threads: one product, a batch, or one for each group of rows, columns or terms.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/matmul.h"
#include "parallel.h"

namespace minirl {

// Distances between the products of a batch, in elements; 0 for an operand that all products share.
struct BatchStrides {
  int64_t a, b, out, addend;
};

// A product as one piece, before it is cut.
static inline Piece whole_product(int64_t rows, int64_t columns, int64_t depth) {
  return {0, 0, 0, 0, rows, columns, rows, columns, depth};
}

// At most `rows` by `columns` of `product`, from `row` and `column` on.
static inline Piece piece_of(const Matmul& args, const Piece& product, int64_t row, int64_t rows, int64_t column,
                             int64_t columns) {
  Piece piece = product;
  piece.a += row * args.a.row_stride;
  piece.b += column * args.b.column_stride;
  piece.out += row * args.out_stride + column;
  piece.addend += row * args.addend_stride + column;
  piece.rows_left -= row;
  piece.columns_left -= column;
  piece.rows = std::min(rows, product.rows - row);
  piece.columns = std::min(columns, product.columns - column);
  return piece;
}

// All products, cut so that each of `threads` has work.
static inline void multiply_products(Matmul args, const std::vector<Piece>& products, int64_t threads) {
  constexpr int64_t kPanels = 32;  // rows or columns of a panel: part of one costs as much as all of it
  int64_t rows = 0, columns = 0, blocks = 0;
  for (const Piece& product : products) {
    rows = std::max(rows, product.rows);
    columns = std::max(columns, product.columns);
    blocks += pieces(product.rows, kBlockRows) * pieces(product.columns, kBlockColumns);
  }
  // blocks of equal height give the threads equal shares
  int64_t block_rows = pieces(pieces(rows, std::max<int64_t>(pieces(rows, kBlockRows), 1)), kPanels) * kPanels;
  int64_t block_columns = kBlockColumns;
  if (blocks < 4 * threads) {
    // few blocks are cut along the longer side, one for each thread, so that little is packed twice
    const int64_t parts = pieces(threads, (int64_t)products.size());
    if (rows < columns)
      block_columns = std::min(block_columns, pieces(pieces(columns, parts), kPanels) * kPanels);
    else
      block_rows = std::min(block_rows, pieces(rows, parts));
  }
  std::vector<Piece> cut;
  int64_t terms = 0;
  for (const Piece& product : products)
    for (int64_t row = 0; row < product.rows; row += block_rows)
      for (int64_t column = 0; column < product.columns; column += block_columns) {
        cut.push_back(piece_of(args, product, row, block_rows, column, block_columns));
        // reading a column costs about as much as multiplying it by eight rows
        terms += cut.back().columns * (cut.back().depth * (cut.back().rows + 8) / 8 + cut.back().rows);
      }
  args.pieces = cut.data();
  if (!cut.empty())
    parallel_rows((int64_t)cut.size(), terms / (int64_t)cut.size(), MINIRL_PICK_PRODUCT(matmul, Matmul), args);
}

static inline void multiply_batch(const Matmul& args, int64_t batch, const BatchStrides& strides, const Piece& product,
                                  int64_t threads) {
  std::vector<Piece> products(batch, product);
  for (int64_t i = 0; i < batch; ++i) {
    products[i].a = i * strides.a;
    products[i].b = i * strides.b;
    products[i].out = i * strides.out;
    products[i].addend = i * strides.addend;
  }
  multiply_products(args, products, threads);
}

// Successive groups divide the rows of a and out, the columns of b and out, or the terms.
enum class Grouped { kRows, kColumns, kTerms };

// Group g ends before ends[g]. Returns the first group whose end is out of order or out of range and writes nothing, or
// returns -1. Rows and columns of no group are 0.
static inline int64_t multiply_groups(const Matmul& args, Grouped grouped, const int32_t* ends, int64_t groups,
                                      const BatchStrides& strides, const Piece& product, int64_t threads) {
  const int64_t size = grouped == Grouped::kRows      ? product.rows
                       : grouped == Grouped::kColumns ? product.columns
                                                      : product.depth;
  std::vector<Piece> products;
  for (int64_t group = 0, begin = 0; group <= groups; ++group) {
    const bool is_rest = group == groups;
    if (is_rest && grouped == Grouped::kTerms) break;
    const int64_t end = is_rest ? size : ends[group];
    if (end < begin || end > size) return group;
    Piece part = product;
    if (grouped == Grouped::kRows) part = piece_of(args, product, begin, end - begin, 0, product.columns);
    if (grouped == Grouped::kColumns) part = piece_of(args, product, 0, product.rows, begin, end - begin);
    if (grouped == Grouped::kTerms) {
      part.a += begin * args.a.column_stride;
      part.b += begin * args.b.row_stride;
      part.depth = end - begin;
    }
    part.a += group * strides.a;
    part.b += group * strides.b;
    part.out += group * strides.out;
    if (is_rest) part.depth = 0;
    products.push_back(part);
    begin = end;
  }
  multiply_products(args, products, threads);
  return -1;
}

}  // namespace minirl
