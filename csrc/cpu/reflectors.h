// Rows appended to a triangular factor by block reflectors.
#pragma once

#include <memory>

#include "matrix.h"

namespace rlsedit {

// R (d x d, upper triangular) <- R_new with R_new'R_new = R'R + K'K and a diagonal >= 0, K (u x d). What is
// below the diagonal is neither read nor written. With v > 0, B (d x v) takes part in the same rotation, its
// new rows V (u x v): [R_new B_new] is the top of Q' [R B; K V].
//
// Householder, column by column: with a = R[j, j] >= 0, r = hypot(a, |x|) and y = x / (a + r), |y| <= 1, the
// reflector I - tau v v', v = [1; y], tau = 2 / (1 + y'y), maps [a; x] to [-r; 0]. Its row of R comes out
// with the wrong sign, and to negate R - tau (R + y'K) would round all of R anew at every append. What is
// computed instead is the correction itself, small where the rows are:
//   R_new = R + tau (y'K - y'y R),   K_new = K - y (R + R_new).
// For a block of n columns, the reflectors in the compact WY form with V = [I; X] and S upper triangular:
//   R_new = R + (X S)'K - E R,   K_new = K - X (R + R_new),   E = 2 I - S' = M S',
// M lower triangular with diagonal |x_j|^2 and 2 x_i'x_j below, so that E is formed without cancellation.
// About 2 d^2 u flops in all.
template <class T>
class Append {
 public:
  Append(int64_t d, int64_t u, int64_t v);  // takes all memory
  ~Append();
  Append(Append&&) noexcept;
  void run(Matrix<T> R, Matrix<const T> K, Matrix<T> B, Matrix<const T> V);

 private:
  class Part;
  int64_t u_;
  std::unique_ptr<Part> part_;  // the rows that are appended at a time
};

}  // namespace rlsedit
