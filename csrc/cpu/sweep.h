// A sweep over the block columns of a triangular matrix with look-ahead, and the rows of a batch as it goes
// along.
#pragma once

#include <algorithm>
#include <cstring>

#include "engine.h"
#include "matrix.h"
#include "parallel.h"
#include "products.h"

namespace rlsedit {

// Columns that are worked on together: the columns of the batch then stay in the second-level cache.
constexpr int64_t kBlockColumns = 192;

// Run factor(0), ..., factor(blocks - 1) in order and, for every p, update(p, q) for p < q < blocks + others,
// each after factor(p). factor(p + 1) starts as soon as its own columns are updated, beside the other
// updates: nothing waits for it but the next step.
template <class Factor, class Update>
void sweep(int64_t blocks, int64_t others, const Factor& factor, const Update& update) {
  factor(0);
  for (int64_t p = 0; p < blocks; ++p)
    for_each_task(blocks - 1 - p + others, [&](int64_t task) {
      update(p, p + 1 + task);
      if (task == 0 && p + 1 < blocks) factor(p + 1);
    });
}

// Rows of A (u x n) for n columns in slabs of nr columns: slab(j / nr)[i * nr + j % nr] = A[i, j]. A slab is
// a right operand of the engine (its k is u) and also a place that products are added to, padded to whole
// left panels.
template <class T>
class Slabs {
 public:
  Slabs(int64_t u, int64_t n) : u(u), n(n), panels(right_size<T>(n, padded(u))) {}

  // At most as many rows as there is memory for.
  void fill(Matrix<const T> A, int64_t rows) {
    const Engine<T>& e = engine<T>();
    u = rows;
    panels.shape(n, u, e.nr, e.nr * padded(u));
    for_each_task(panels.count(), [&](int64_t i) {
      const int64_t column = i * e.nr;
      e.pack_right(slab(i), panels.stride, A.at(0, column), std::min(e.nr, n - column), u, A.cs, A.rs);
      std::fill(slab(i) + e.nr * u, slab(i) + panels.stride, T(0));
    });
  }

  T* slab(int64_t i) const { return panels.panel(i); }

  // Columns [column, column + count) one after the other, ldx apart, and back; `column` starts a slab.
  void gather(int64_t column, int64_t count, T* X, int64_t ldx) const {
    const int64_t nr = panels.width;
    for (int64_t c = 0; c < count; ++c) {
      const T* from = slab((column + c) / nr) + (column + c) % nr;
      for (int64_t i = 0; i < u; ++i) X[c * ldx + i] = from[i * nr];
      std::fill(X + c * ldx + u, X + (c + 1) * ldx, T(0));
    }
  }
  void scatter(int64_t column, int64_t count, const T* X, int64_t ldx) const {
    const int64_t nr = panels.width;
    for (int64_t c = 0; c < count; ++c) {
      T* to = slab((column + c) / nr) + (column + c) % nr;
      for (int64_t i = 0; i < u; ++i) to[i * nr] = X[c * ldx + i];
    }
  }

  // Rows of a left operand with u rows, padding included.
  static int64_t padded(int64_t rows) {
    const int64_t mr = engine<T>().mr;
    return (rows + mr - 1) / mr * mr;
  }

  int64_t u, n;
  Panels<T> panels;
};

// Distance of columns of u entries for the engine's column kernels.
inline int64_t column_distance(int64_t u) {
  return (u + kColumnStep - 1) / kColumnStep * kColumnStep;
}

// dst (rows x width, row-major) <- A (rows x count, any strides), zero beyond count; and back.
template <class T>
void load_block(T* dst, int64_t width, Matrix<const T> A, int64_t rows, int64_t count) {
  for (int64_t i = 0; i < rows; ++i, dst += width) {
    if (A.cs == 1 && count == width) {
      std::memcpy(dst, A.at(i, 0), static_cast<size_t>(width) * sizeof(T));
    } else {
      for (int64_t j = 0; j < count; ++j) dst[j] = *A.at(i, j);
      for (int64_t j = count; j < width; ++j) dst[j] = T(0);
    }
  }
}

}  // namespace rlsedit
