// A product of two narrow matrices, added to a large one.
#pragma once

#include <algorithm>

#include "key_products.h"

namespace rlsedit {

// W (m x n) <- W + alpha A B' for A (m x u) and B (n x u), tile by tile, along the rows of W or, where those
// are not adjacent and its columns are, along these; left and right are to hold A and B, whichever comes
// first.
template <class T>
void add_product(Matrix<const T> A, Matrix<const T> B, int64_t m, int64_t n, int64_t u, T alpha, Matrix<T> W,
                 Panels<T>& left, Panels<T>& right) {
  if (W.rs == 1 && W.cs != 1) return add_product(B, A, n, m, u, alpha, W.transposed(), right, left);
  const Engine<T>& e = engine<T>();
  if (2 * u <= e.few && W.cs == 1) {
    T* to = left.memory.get();
    const T *a = rows_of(A, m, u, to), *b = rows_of(B.transposed(), u, n, right.memory.get());
    for (int64_t i = 0; i < m * u; ++i) to[i] *= alpha;
    constexpr int64_t kRows = 64;
    for_each_task((m + kRows - 1) / kRows, [&](int64_t task) {
      const int64_t i = task * kRows;
      e.add_few(W.at(i, 0), W.rs, std::min(kRows, m - i), n, a + i * u, u, b, n, u);
    });
    return;
  }
  pack_left(A, m, u, left);
  pack_right(B, n, u, right);
  const int64_t down = (m + kTile - 1) / kTile, across = (n + kTile - 1) / kTile;
  for_each_task(down * across, [&](int64_t task) {
    const int64_t i0 = task / across * kTile, j0 = task % across * kTile;
    e.tile({left.panel(i0 / e.mr), left.stride, right.panel(j0 / e.nr), right.stride, std::min(kTile, m - i0),
            std::min(kTile, n - j0), u, alpha, T(1), W.at(i0, j0), W.rs, W.cs, false, nullptr});
  });
}

}  // namespace rlsedit
