// The large products that the ops share, each over all threads.
#pragma once

#include "engine.h"
#include "matrix.h"

namespace rlsedit {

// A (rows x k) as a left and as a right operand.
template <class T>
Panels<T> pack_left(Matrix<const T> A, int64_t rows, int64_t k);
template <class T>
Panels<T> pack_right(Matrix<const T> A, int64_t rows, int64_t k);

// A K' (n x u) as right panels, from A (n x d) and the left panels of K (u x d); one pass over A.
template <class T>
Panels<T> times_keys(Matrix<const T> A, int64_t n, const Panels<T>& keys);

// The same for a symmetric C, read along its rows.
template <class T>
Panels<T> covariance_times_keys(Matrix<const T> C, const Panels<T>& keys) {
  return times_keys(by_rows(C), keys.k, keys);
}

// G = K Y (u x u), exactly symmetric: the lower triangle is computed and mirrored.
template <class T>
void gram(const Panels<T>& keys, const Panels<T>& Y, Matrix<T> G);

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
