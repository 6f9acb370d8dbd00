// A block's tile of a product of two matrices in global memory, through a ring of buffers in shared memory.
#pragma once

#include "adjacent.h"
#include "copy.h"
#include "mma.h"

namespace rlsedit {

// sum[i][j] += sum_k A[row + i][k] B(j, k), where B(j, k) is B[column + j][k], or B[k][column + j] if TURNED.
//
// WM x WN warps, each with MT x NT tiles of 16 x 8. Shared memory: per buffer the left rows with kDepth
// terms, 4 elements of padding each, so that the 32 fragments a warp reads (4 apart, 4 side by side) lie in
// different banks; the right operand likewise, or, turned, kDepth rows of kColumns and 32 bytes of padding.
template <class E, int WM, int WN, int MT, int NT, bool TURNED>
struct TileProduct {
  using T = typename E::T;
  static constexpr int kThreads = 32 * WM * WN, kRowTiles = MT, kColumnTiles = NT;
  static constexpr int kRows = 16 * MT * WM, kColumns = 8 * NT * WN, kDepth = 128 / sizeof(T);
  static constexpr int kLeftLd = kDepth + 4, kRightLd = TURNED ? kColumns + 32 / int(sizeof(T)) : kDepth + 4;
  static constexpr int kLeft = kRows * kLeftLd, kRight = (TURNED ? kDepth : kColumns) * kRightLd;
  static constexpr int kBuffer = kLeft + kRight;
  static constexpr size_t kBufferBytes = kBuffer * sizeof(T);  // two buffers or three, as there is room
  static_assert(kColumns % 16 == 0, "a turned tile is copied by 16 bytes");

  T sum[MT][NT][4];

  // Place of the warp's tile in the block's.
  RLSEDIT_DEVICE static int warp_row() { return warp_index() / WN * 16 * MT; }
  RLSEDIT_DEVICE static int warp_column() { return warp_index() % WN * 8 * NT; }

  // Terms [begin, end); `begin` a multiple of kDepth, or of 16 bytes at least. All threads meet at the end:
  // the shared memory is free again.
  RLSEDIT_DEVICE void add(const Matrix<const T>& A, int64_t row, int64_t rows, const Matrix<const T>& B,
                          int64_t column, int64_t columns, int64_t begin, int64_t end, T* memory,
                          int stages) {
    const bool wide_a = wide(A), wide_b = wide(B);
    const int steps = static_cast<int>(ceil_div(end - begin, kDepth));
    const auto fetch = [&](int step) {
      T* left = memory + step % stages * kBuffer;
      const int64_t k = begin + static_cast<int64_t>(step) * kDepth;
      copy_tile<kDepth, kLeftLd, kThreads>(left, kRows, A, wide_a, row, k, rows, end);
      if constexpr (TURNED)
        copy_tile<kColumns, kRightLd, kThreads>(left + kLeft, kDepth, B, wide_b, k, column, end, columns);
      else
        copy_tile<kDepth, kRightLd, kThreads>(left + kLeft, kColumns, B, wide_b, column, k, columns, end);
    };
    for (int step = 0; step < stages - 1; ++step) {
      if (step < steps) fetch(step);
      copy_commit();
    }
    for (int step = 0; step < steps; ++step) {
      if (stages == 2)
        copy_wait<0>();
      else
        copy_wait<1>();
      __syncthreads();
      if (step + stages - 1 < steps) fetch(step + stages - 1);
      copy_commit();
      const T* left = memory + step % stages * kBuffer;
      const int64_t terms = end - begin - static_cast<int64_t>(step) * kDepth;
      const int depth = static_cast<int>(lesser<int64_t>(ceil_div(terms, 8) * 8, kDepth));
      multiply<E, MT, NT, TURNED>(sum, left + warp_row() * kLeftLd, kLeftLd,
                                  left + kLeft + place<TURNED>(warp_column(), 0, kRightLd), kRightLd, depth);
    }
    copy_wait<0>();
    __syncthreads();
  }

  // f(row, column, sum) with places in the block's tile.
  template <class F>
  RLSEDIT_DEVICE void each(const F& f) {
    const int r = warp_row(), c = warp_column();
    for_each_sum(sum, [&](int i, int j, T& value) { f(r + i, c + j, value); });
  }

  // f(row, column, x, y), x and y in columns `column` (even) and column + 1.
  template <class F>
  RLSEDIT_DEVICE void each_pair(const F& f) {
    const int r = warp_row(), c = warp_column();
    for_each_pair(sum, [&](int i, int j, T& x, T& y) { f(r + i, c + j, x, y); });
  }
};

// Rows and columns of tile `index` of a lower triangle, numbered row by row.
RLSEDIT_DEVICE void lower_tile(int index, int& i, int& j) {
  i = static_cast<int>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
  while (i > 0 && static_cast<int64_t>(i) * (i + 1) / 2 > index) --i;  // the root is rounded
  while (static_cast<int64_t>(i + 1) * (i + 2) / 2 <= index) ++i;
  j = index - static_cast<int>(static_cast<int64_t>(i) * (i + 1) / 2);
}

}  // namespace rlsedit
