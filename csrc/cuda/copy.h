// Tiles from global to shared memory, asynchronously (cp.async), zero where the matrix ends.
#pragma once

#include "matrices.h"

namespace rlsedit {

// BYTES (4, 8 or 16) from global to shared memory; the first `valid` are read, the others become zero.
template <int BYTES>
RLSEDIT_DEVICE void copy_async(void* to, const void* from, int valid) {
#ifdef RLSEDIT_EMULATE
  emulate::copy_async(to, from, BYTES, valid);
#else
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16)  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(place), "l"(from), "n"(BYTES),
                 "r"(valid)
                 : "memory");
#endif
}

// What was started since the last commit becomes one group.
RLSEDIT_DEVICE void copy_commit() {
#ifdef RLSEDIT_EMULATE
  emulate::copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most LEFT of this thread's groups are under way.
template <int LEFT>
RLSEDIT_DEVICE void copy_wait() {
#ifdef RLSEDIT_EMULATE
  emulate::copy_wait(LEFT);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// to[r][c] (height x COLUMNS, LD apart) <- A[row + r][column + c], zero outside of rows x columns. THREADS
// threads, not waited for. LD times the element size is a multiple of 16 bytes, and COLUMNS of 16 bytes.
template <int COLUMNS, int LD, int THREADS, class T>
RLSEDIT_DEVICE void copy_tile(T* to, int height, const Matrix<const T>& A, bool by16, int64_t row,
                              int64_t column, int64_t rows, int64_t columns) {
  constexpr int kWide = 16 / sizeof(T), kAcross = COLUMNS / kWide;
  static_assert(COLUMNS % kWide == 0 && LD % kWide == 0, "tiles of 16 bytes");
  if (by16) {  // a thread keeps its columns: one address, and one length, for all its rows
    constexpr int kStep = THREADS / kAcross;
    static_assert(THREADS % kAcross == 0, "whole rows of copies");
    const int first = static_cast<int>(threadIdx.x) / kAcross,
              c = static_cast<int>(threadIdx.x) % kAcross * kWide;
    const int64_t left = lesser<int64_t>(greater<int64_t>(columns - column - c, 0), kWide),
                  below = rows - row;
    const int valid = static_cast<int>(left) * static_cast<int>(sizeof(T));
    const T* from = A.data + (row + first) * A.rs + column + c;
#pragma unroll 4
    for (int r = first; r < height; r += kStep, from += kStep * A.rs) {
      const bool inside = valid > 0 && r < below;
      copy_async<16>(to + r * LD + c, inside ? from : A.data, inside ? valid : 0);
    }
    return;
  }
  const bool down = A.rs == 1 && A.cs != 1;  // threads side by side read adjacent elements
  for (int i = static_cast<int>(threadIdx.x); i < height * COLUMNS; i += THREADS) {
    const int r = down ? i % height : i / COLUMNS, c = down ? i / height : i % COLUMNS;
    const bool inside = row + r < rows && column + c < columns;
    copy_async<sizeof(T)>(to + r * LD + c, inside ? &A.at(row + r, column + c) : A.data,
                          inside ? static_cast<int>(sizeof(T)) : 0);
  }
}

// What is read later than a product is formed: its lines begin to come into the second-level cache now. A
// tile (ROWS x COLUMNS) of a matrix with adjacent elements along either index; nothing for others.
template <int ROWS, int COLUMNS, int THREADS, class T>
RLSEDIT_DEVICE void prefetch_tile(const Matrix<T>& A, int64_t row, int64_t column, int64_t rows,
                                  int64_t columns) {
#ifndef RLSEDIT_EMULATE
  constexpr int kLine = 128 / sizeof(T);
  const bool down = A.rs == 1 && A.cs != 1;
  if (!down && A.cs != 1) return;
  const int lines = (down ? ROWS : COLUMNS) / kLine, count = lines * (down ? COLUMNS : ROWS);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += THREADS) {
    const int64_t along = i % lines * kLine, across = i / lines;
    const int64_t r = row + (down ? along : across), c = column + (down ? across : along);
    if (r < rows && c < columns) asm volatile("prefetch.global.L2 [%0];" ::"l"(&A.at(r, c)));
  }
#else
  (void)A, (void)row, (void)column, (void)rows, (void)columns;
#endif
}

}  // namespace rlsedit
