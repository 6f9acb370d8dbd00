// The large products that the ops share, each over all threads.
#pragma once

#include <algorithm>

#include "engine.h"
#include "matrix.h"

namespace rlsedit {

// Elements of an operand (rows x k) in whole panels: a left one, a right one, and either.
template <class T>
int64_t left_size(int64_t rows, int64_t k) {
  return (rows + engine<T>().mr - 1) / engine<T>().mr * engine<T>().mr * k;
}
template <class T>
int64_t right_size(int64_t rows, int64_t k) {
  return (rows + engine<T>().nr - 1) / engine<T>().nr * engine<T>().nr * k;
}
template <class T>
int64_t operand_size(int64_t rows, int64_t k) {
  return std::max(left_size<T>(rows, k), right_size<T>(rows, k));
}

// A (rows x k) as a left and as a right operand.
template <class T>
void pack_left(Matrix<const T> A, int64_t rows, int64_t k, Panels<T>& to);
template <class T>
void pack_right(Matrix<const T> A, int64_t rows, int64_t k, Panels<T>& to);

// K (u x d) and its products with matrices of n rows, in memory that is taken once. What `keys` and `turned`
// hold may be written over when it is not needed any more, by operands of d and of n rows with u columns.
template <class T>
struct KeyProducts {
  KeyProducts(int64_t u, int64_t d, int64_t n);
  // As a left operand.
  void pack(Matrix<const T> K);
  // Y = A K' (n x u) as right panels, from A (n x d); one pass over A.
  void multiply(Matrix<const T> A);
  // G = K Y (u x u), exactly symmetric: the lower triangle is computed and mirrored. For n = d.
  void gram(Matrix<T> G);

  int64_t u, d, n;
  Panels<T> keys, Y, turned;
  Scratch<T> rows;  // few keys once more, one after the other
};

// Lower triangle of C (m x m) <- beta C + alpha A B', where A B' is symmetric; with `mirrored`, the upper one
// too.
template <class T>
void lower_product(const Panels<T>& A, const Panels<T>& B, T alpha, T beta, Matrix<T> C, bool mirrored,
                   int64_t tile);

// Rows of a tile of C: four tiles' worth of C and operands fit the second-level cache. Multiples of the
// engine's mr and nr, kTile of those of all engines.
constexpr int64_t kTile = 192;
template <class T>
int64_t small_tile() {
  return engine<T>().nr > 16 ? 96 : 48;
}

}  // namespace rlsedit
