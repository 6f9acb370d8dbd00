// A panel of 32 columns reduced by Householder reflectors, and its block reflector, by one block of threads.
//
// With a = R[j, j] >= 0 and x the rows' column j: r = hypot(a, |x|), y = x / (a + r), tau = 2 / (1 + y'y).
// The reflectors are applied as corrections of R (csrc/cpu/reflectors.h says why):
//     R_new = R + tau (y'K - y'y R),   K_new = K - y (R + R_new)
// and for the whole panel, with X = [y_1 .. y_32] and S upper triangular:
//     R_new = R + (X S)'K - E R,       K_new = K - X (R + R_new)
//     S^-1 = strictly upper X'X + diagonal (1 + |y_j|^2) / 2
//     E = M S',  M = twice the strictly lower X'X + diagonal |y_j|^2
#pragma once

#include "copy.h"
#include "mma.h"
#include "triangle.h"

namespace rlsedit {

constexpr int kPanel = 32;      // columns of a panel
constexpr int kMostRows = 128;  // appended at a time
constexpr int kQrThreads = 256, kQrWarps = kQrThreads / 32;
constexpr int kRowsLd = kMostRows + 4;

// The block reflector in global memory: signs of R's diagonal, X (rows, 32), (X S)' (32, kMostRows), E (32,
// 32).
template <class T>
struct Reflector {
  static constexpr int64_t kSize = kPanel + 2 * kMostRows * kPanel + kPanel * kPanel;
  T* memory;

  RLSEDIT_DEVICE T* sign() const { return memory; }
  RLSEDIT_DEVICE T* x() const { return memory + kPanel; }
  RLSEDIT_DEVICE T* xs() const { return memory + kPanel + kMostRows * kPanel; }
  RLSEDIT_DEVICE T* e() const { return memory + kPanel + 2 * kMostRows * kPanel; }
};

template <class T>
RLSEDIT_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int other = 16; other > 0; other >>= 1) value += __shfl_xor_sync(0xffffffffu, value, other);
  return value;
}

// One reflector, by the warp that holds the column (rows lane + 32 q): y in the place of x.
template <class T>
struct Householder {
  static constexpr int kParts = kMostRows / 32;
  T y[kParts], tau, square, length;

  RLSEDIT_DEVICE Householder(const T (&x)[kParts], double alpha) {
    double sigma, long_side;         // sigma: |x|, or its square
    if constexpr (sizeof(T) == 4) {  // squares of float32 neither overflow nor vanish in float64
      double sum = 0.0;
#pragma unroll
      for (int q = 0; q < kParts; ++q) sum += static_cast<double>(x[q]) * static_cast<double>(x[q]);
      sigma = warp_sum(sum);
      long_side = sqrt(alpha * alpha + sigma);
    } else {
      double largest = 0.0, sum = 0.0;
#pragma unroll
      for (int q = 0; q < kParts; ++q) largest = fmax(largest, fabs(x[q]));
#pragma unroll
      for (int other = 16; other > 0; other >>= 1)
        largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, other));
      const double unit = largest > 0.0 ? largest : 1.0;
#pragma unroll
      for (int q = 0; q < kParts; ++q) sum += (x[q] / unit) * (x[q] / unit);
      sigma = largest * sqrt(warp_sum(sum));
      const double large = fmax(alpha, sigma), ratio = large > 0.0 ? fmin(alpha, sigma) / large : 0.0;
      long_side = large * sqrt(1.0 + ratio * ratio);
    }
    // Every column waits for this. What a float32 is divided by has an inverse in float64; a float64 may not.
    const double over = sizeof(T) == 4 ? 1.0 / (alpha + long_side) : 0.0;
    double sum = 0.0;
#pragma unroll
    for (int q = 0; q < kParts; ++q) {
      const double value = static_cast<double>(x[q]);
      const double quotient = sizeof(T) == 4 ? value * over : value / (alpha + long_side);
      y[q] = sigma > 0.0 ? static_cast<T>(quotient) : T(0);
      sum += static_cast<double>(y[q]) * static_cast<double>(y[q]);
    }
    sum = warp_sum(sum);
    square = static_cast<T>(sum);
    tau = static_cast<T>(2.0 / (1.0 + sum));
    length = static_cast<T>(long_side);
  }
};

// A (32 x 32 tile, upper triangle, diagonal >= 0) after the rows X (32 columns, `ld` apart, kMostRows of
// them) have gone in; X becomes the reflectors. Warp w holds columns w, w + 8, w + 16, w + 24; `room`: 2
// (kMostRows + 4) elements.
template <class T>
RLSEDIT_DEVICE void reflect(T* A, T* X, int ld, T* room) {
  constexpr int kParts = Householder<T>::kParts, kOwn = kPanel / kQrWarps;
  const int lane = lane_index(), warp = warp_index();
  T x[kOwn][kParts];
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int q = 0; q < kParts; ++q) x[i][q] = X[(lane + 32 * q) * ld + warp + kQrWarps * i];
#pragma unroll
  for (int round = 0; round < kOwn; ++round)
#pragma unroll 1
    for (int owner = 0; owner < kQrWarps; ++owner) {
      const int j = round * kQrWarps + owner;
      T* shown = room + j % 2 * (kMostRows + 4);
      if (warp == owner) {
        const Householder<T> h(x[round], static_cast<double>(A[j * kTileLd + j]));
#pragma unroll
        for (int q = 0; q < kParts; ++q) {
          shown[lane + 32 * q] = h.y[q];
          x[round][q] = h.y[q];
        }
        if (lane == 0) {
          shown[kMostRows] = h.tau;
          shown[kMostRows + 1] = h.square;
          A[j * kTileLd + j] = h.length;
        }
      }
      __syncthreads();  // one in a step: the next owner writes to the other half of the room
      T y[kParts];
#pragma unroll
      for (int q = 0; q < kParts; ++q) y[q] = shown[lane + 32 * q];
      const T tau = shown[kMostRows], square = shown[kMostRows + 1];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int c = warp + kQrWarps * i;
        if (c <= j) continue;
        T product = T(0);
#pragma unroll
        for (int q = 0; q < kParts; ++q) product += y[q] * x[i][q];
        product = warp_sum(product);
        const T old = A[j * kTileLd + c], now = old + tau * (product - square * old);
        __syncwarp();
        if (lane == 0) A[j * kTileLd + c] = now;
#pragma unroll
        for (int q = 0; q < kParts; ++q) x[i][q] -= y[q] * (old + now);
      }
    }
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int q = 0; q < kParts; ++q) X[(lane + 32 * q) * ld + warp + kQrWarps * i] = x[i][q];
  __syncthreads();
}

// X S, E and X itself into `out`, from the reflectors X (kMostRows x 32, kTileLd apart). XT: room for X' (32
// x kMostRows, kRowsLd apart); lower, twice: room for tiles.
template <class T>
RLSEDIT_DEVICE void form_reflector(const T* X, T* XT, T* lower, T* twice, const Reflector<T>& out) {
  using E = Ieee<T>;
  for (int i = static_cast<int>(threadIdx.x); i < kMostRows * kPanel; i += kQrThreads) {
    const T value = X[i / kPanel * kTileLd + i % kPanel];
    XT[i % kPanel * kRowsLd + i / kPanel] = value;
    out.x()[i] = value;
  }
  __syncthreads();
  const int m = 16 * (warp_index() & 1), n = 8 * (warp_index() >> 1);
  {
    T gram[1][1][4];
    clear(gram);
    multiply<E, 1, 1, true>(gram, XT + m * kRowsLd, kRowsLd, X + n, kTileLd, kMostRows);
    for_each_sum(gram, [&](int i, int j, T value) {
      const int r = m + i, c = n + j;
      const T half = T(0.5) * (T(1) + value);
      lower[r * kTileLd + c] = r > c ? value : r == c ? half : T(0);
      twice[r * kTileLd + c] = r > c ? T(2) * value : r == c ? value : T(0);
      if (r == c) lower[r * kTileLd + kSide] = T(1) / half;
    });
  }
  __syncthreads();
  if (warp_index() == 0) invert_triangle(lower);  // S'
  __syncthreads();
  {
    T sum[1][1][4];
    clear(sum);
    multiply<E, 1, 1, true>(sum, twice + m * kTileLd, kTileLd, lower + n, kTileLd, kPanel);
    for_each_sum(sum, [&](int i, int j, T value) { out.e()[(m + i) * kPanel + n + j] = value; });
  }
  constexpr int kWide = kMostRows / 4;  // columns of a warp
  T sum[1][kWide / 8][4];
  clear(sum);
  const int first = kWide * (warp_index() >> 1);
  multiply<E, 1, kWide / 8, false>(sum, lower + m * kTileLd, kTileLd, X + first * kTileLd, kTileLd, kPanel);
  for_each_sum(sum, [&](int i, int j, T value) { out.xs()[(m + i) * kMostRows + first + j] = value; });
}

}  // namespace rlsedit
