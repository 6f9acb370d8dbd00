// Triangular tiles of 32 x 32, by a warp or a thread.
#pragma once

#include "port.h"

namespace rlsedit {

constexpr int kSide = 32;
// 36 apart: fragments of the tensor cores are read without bank conflicts; column 32 of row k holds 1 /
// L[k][k].
constexpr int kTileLd = 36, kTileSize = kSide * kTileLd;

template <class T>
RLSEDIT_DEVICE bool usable(T pivot) {
  return pivot > T(0) && pivot - pivot == T(0);
}

// Lower Cholesky factor of a tile, zeros above, by one warp; `bad` becomes first + k + 1 at the first
// unusable pivot k, in whose place 1 is taken. A lane holds a row.
template <class T>
RLSEDIT_DEVICE void factor_triangle(T* tile, int first, int& bad) {
  const int lane = lane_index();
  T row[kSide];
#pragma unroll
  for (int j = 0; j < kSide; ++j) row[j] = tile[lane * kTileLd + j];
  T inverse = T(1);
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    const T pivot = __shfl_sync(0xffffffffu, row[j], j);
    const bool good = usable(pivot);
    if (!good && bad == 0) bad = first + j + 1;
    const T root = good ? sqrt(pivot) : T(1), over = T(1) / root;
    if (lane == j) inverse = over;
    row[j] = lane == j ? root : lane > j ? row[j] * over : T(0);
#pragma unroll
    for (int c = j + 1; c < kSide; ++c) row[c] -= row[j] * __shfl_sync(0xffffffffu, row[j], c);
  }
#pragma unroll
  for (int j = 0; j < kSide; ++j) tile[lane * kTileLd + j] = row[j];
  tile[lane * kTileLd + kSide] = inverse;
}

// x <- x L^-T for a row x of a tile and the factor L of the diagonal tile, by one thread.
template <class T>
RLSEDIT_DEVICE void solve_row(T* row, const T* L) {
  T x[kSide];
#pragma unroll
  for (int j = 0; j < kSide; ++j) x[j] = row[j];
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    x[j] *= L[j * kTileLd + kSide];
#pragma unroll
    for (int c = j + 1; c < kSide; ++c) x[c] -= x[j] * L[c * kTileLd + j];
  }
#pragma unroll
  for (int j = 0; j < kSide; ++j) row[j] = x[j];
}

// L^-1 in the place of L (with 1 / L[k][k] in column 32), zeros above, by one warp: a lane holds a column.
template <class T>
RLSEDIT_DEVICE void invert_triangle(T* tile) {
  const int lane = lane_index();
  T x[kSide];
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
    T sum = r == lane ? T(1) : T(0);
#pragma unroll
    for (int m = 0; m < r; ++m) sum -= tile[r * kTileLd + m] * x[m];
    x[r] = sum * tile[r * kTileLd + kSide];
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kSide; ++r) tile[r * kTileLd + lane] = x[r];
  __syncwarp();
}

}  // namespace rlsedit
