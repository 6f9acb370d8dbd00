// K A for a few rows K and any matrix A, in one pass over A.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "products.h"

namespace rlsedit {

// to (m x n, in rows of adjacent elements) <- A
template <class T>
const T* rows_of(Matrix<const T> A, int64_t m, int64_t n, T* to) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) to[i * n + j] = *A.at(i, j);
  return to;
}

// to (u x n, row-major) <- K A, or V - K A where there is a V. K A has few rows and a long sum: columns of A
// (d x n) are packed as they are read, a group a task.
template <class T>
void form_key_products(Matrix<const T> A, Matrix<const T> K, const Matrix<const T>* V,
                       KeyProducts<T>& products, T* to) {
  const Engine<T>& e = engine<T>();
  const int64_t d = products.d, u = products.u, n = products.n;
  const auto put = [&](const T* from, int64_t stride, int64_t first, int64_t count) {
    for (int64_t c = 0; c < u; ++c) {
      const T* row = from + c * stride;
      T* out = to + c * n + first;
      if (V)
        for (int64_t j = 0; j < count; ++j) out[j] = *V->at(c, first + j) - row[j];
      else if (row != out)
        std::copy(row, row + count, out);
    }
  };
  if (2 * u <= e.few && A.cs == 1) {
    const T* keys = rows_of(K, u, d, products.rows.get());
    for_each_task((n + kTile - 1) / kTile, [&](int64_t task) {
      const int64_t first = task * kTile, count = std::min(kTile, n - first);
      e.combine(keys, d, u, A.at(0, first), A.rs, d, count, to + first, n);
      put(to + first, n, first, count);
    });
    return;
  }
  products.pack(K);
  products.multiply(A.transposed());
  for_each_task(products.Y.count(), [&](int64_t i) {
    const int64_t first = i * e.nr;
    put(products.Y.panel(i), e.nr, first, std::min(e.nr, n - first));
  });
}

}  // namespace rlsedit
