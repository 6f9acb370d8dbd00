// A panel of 32 columns reduced by Householder reflectors, and its block reflector, by one block of threads.
//
// With a = R[j, j] >= 0 and x the rows' column j, s = x'x:
//     length = sqrt(a a + s), over = 1 / (a + length), y = over x, tau = 2 / (1 + y'y) = 1 + a / length
// The reflectors are applied as corrections of R (csrc/cpu/reflectors.h says why):
//     R_new = R + tau (y'K - y'y R),   K_new = K - y (R + R_new)
// and for the whole panel, with X = [y_1 .. y_32] and S upper triangular:
//     R_new = R + S'X'K - E R,         K_new = K - X (R + R_new)
//     S'^-1 = strictly lower X'X + diagonal (1 + |y_j|^2) / 2
//     E = 2 I - S': -S' off the diagonal and tau_j |y_j|^2 on it, where 2 - tau_j would cancel
// With L = strictly lower S' and W = X'K the correction needs one product more and no E:
//     R_new - R = L (W + R) + tau W - tau |y|^2 R
//
// One step a column, and every step waits for the one before. It is kept short by this: the owner of column j
// shows x_j as it is; all form x'x and x'x_c side by side, and the reflector is three scalars that everyone
// works out. For c < j the same x'x_c, times both scales, is y_c'y_j: X'X needs no product of its own. And
// one barrier a step. About 400 cycles: 30 the barrier, 35 loads, 65 products, 85 sums over 8 lanes, 110
// square root and reciprocal, 30 coefficients, 35 the update, 10 to show the next column.
//
// Sums in the elements' own type: a column's scale is a power of two, so that neither squares overflow nor
// what matters of them underflows. A column whose rows are below 1e-15 (float64: 1e-145) of the column's
// largest element is left out (y = 0), a perturbation far below its rounding.
#pragma once

#include "adjacent.h"
#include "copy.h"
#include "dataflow.h"
#include "deep_product.h"
#include "triangle.h"

namespace rlsedit {

constexpr int kPanel = 32;      // columns of a panel
constexpr int kMostRows = 128;  // appended at a time
constexpr int kQrThreads = 256, kQrWarps = kQrThreads / 32;
constexpr int kRowsLd = kMostRows + 4;
constexpr int kLanes = kQrThreads / kPanel;  // that share a column
constexpr int kHeld = kMostRows / kLanes;    // elements of it in a lane

// The block reflector in global memory: X' (32, kMostRows), L' (32, 32), and three vectors of 32: signs of
// R's diagonal, tau, tau |y|^2.
template <class T>
struct Reflector {
  static constexpr int64_t kSize = kPanel * kMostRows + kPanel * kPanel + 3 * kPanel;
  T* memory;

  RLSEDIT_DEVICE T* x() const { return memory; }
  RLSEDIT_DEVICE T* l() const { return memory + kPanel * kMostRows; }
  RLSEDIT_DEVICE T* sign() const { return l() + kPanel * kPanel; }
  RLSEDIT_DEVICE T* tau() const { return sign() + kPanel; }
  RLSEDIT_DEVICE T* shrink() const { return tau() + kPanel; }
};

// A lane's part of a column: rows 4 (lane + 8 q) to 4 (lane + 8 q) + 3.
template <class T>
RLSEDIT_DEVICE void load_column(T (&x)[kHeld], const T* column) {
  using W = Wide<T>;
  const T* from = column + 4 * (static_cast<int>(threadIdx.x) % kLanes);
#pragma unroll
  for (int i = 0; i < kHeld; i += W::kCount) {
    const W four = *reinterpret_cast<const W*>(from + i % 4 + i / 4 * 4 * kLanes);
#pragma unroll
    for (int k = 0; k < W::kCount; ++k) x[i + k] = four.v[k];
  }
}

// To shared memory.
template <class T>
RLSEDIT_DEVICE void show_column(T* column, const T (&x)[kHeld]) {
  using W = Wide<T>;
  T* to = column + 4 * (static_cast<int>(threadIdx.x) % kLanes);
#pragma unroll
  for (int i = 0; i < kHeld; i += W::kCount) {
    W four;
#pragma unroll
    for (int k = 0; k < W::kCount; ++k) four.v[k] = x[i + k];
    *reinterpret_cast<W*>(to + i % 4 + i / 4 * 4 * kLanes) = four;
  }
}

// To global memory.
template <class T>
RLSEDIT_DEVICE void store_column(T* column, const T (&x)[kHeld], T times) {
  constexpr int kCount = Wide<T>::kCount;
  T* to = column + 4 * (static_cast<int>(threadIdx.x) % kLanes);
#pragma unroll
  for (int i = 0; i < kHeld; i += kCount) {
    T four[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) four[k] = x[i + k] * times;
    store_adjacent(to + i % 4 + i / 4 * 4 * kLanes, four);
  }
}

// Over the lanes of a column; every lane has the same bits.
template <class T>
RLSEDIT_DEVICE T column_sum(T value) {
#pragma unroll
  for (int other = kLanes / 2; other > 0; other >>= 1) value += __shfl_xor_sync(0xffffffffu, value, other);
  return value;
}

template <class T>
RLSEDIT_DEVICE T product(const T (&x)[kHeld], const T (&y)[kHeld]) {
  T part[4] = {T(0), T(0), T(0), T(0)};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) part[i % 4] += x[i] * y[i];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// 1 / sqrt(x) and 1 / x to 22 bits; for neither a subnormal x nor a subnormal result.
RLSEDIT_DEVICE float rough_over_root(float x) {
#ifdef RLSEDIT_EMULATE
  return emulate::rough(1.0f / sqrt(x));
#else
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

RLSEDIT_DEVICE float rough_reciprocal(float x) {
#ifdef RLSEDIT_EMULATE
  return emulate::rough(1.0f / x);
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// Square root, and one over it. For float32 one step of Newton each: the branches of IEEE's rare cases would
// be as long as the rest, and one after the other.
RLSEDIT_DEVICE float root(float x, float& over) {
  const float near = rough_over_root(x), first = x * near;
  const float result = fma(fma(-first, first, x), 0.5f * near, first);
  over = fma(fma(-result, near, 1.0f), near, near);
  return result;
}
RLSEDIT_DEVICE double root(double x, double& over) {
  const double result = sqrt(x);
  over = 1.0 / result;
  return result;
}

RLSEDIT_DEVICE float reciprocal(float x) {
  const float near = rough_reciprocal(x);
  return fma(fma(-x, near, 1.0f), near, near);
}
RLSEDIT_DEVICE double reciprocal(double x) {
  return 1.0 / x;
}

// What `reflect` needs of shared memory beside A: two columns of the rows, two rows of X'X, the scales.
constexpr int kReflectRoom = 2 * kMostRows + 3 * kPanel;

// A (32 x 32 tile, upper triangle, diagonal of any sign) after the rows have gone in; `rows`: kPanel columns,
// kRowsLd apart. The block reflector goes to `out`. Thread t: column t / 8.
template <class T>
RLSEDIT_DEVICE void reflect(T* A, const T* rows, T* room, const Reflector<T>& out) {
  constexpr int kExponent = sizeof(T) == 4 ? 126 : 1022;
  constexpr double kTiny = sizeof(T) == 4 ? 1e-30 : 1e-290;
  const int c = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  T *shown = room, *gram = shown + 2 * kMostRows, *scales = gram + 2 * kPanel;
  T x[kHeld];
  load_column(x, rows + c * kRowsLd);

  T largest = T(0);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) largest = fmax(largest, fabs(x[i]));
  for (int r = lane; r < kPanel; r += kLanes) {
    const T sign = A[r * kTileLd + r] < T(0) ? T(-1) : T(1);
    if (c == 0) out.sign()[r] = sign;
    if (r <= c) largest = fmax(largest, fabs(A[r * kTileLd + c]));
    if (r < c) A[r * kTileLd + c] *= sign;
  }
#pragma unroll
  for (int other = kLanes / 2; other > 0; other >>= 1)
    largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, other));
  int exponent = largest > T(0) ? ilogb(largest) : 0;
  exponent = lesser(greater(exponent, -kExponent), kExponent);
  const T scale = ldexp(T(1), -exponent), back = ldexp(T(1), exponent);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) x[i] *= scale;
  if (c == 0) show_column(shown, x);
  if (lane == 0) scales[c] = scale;

  T inverse[kPanel / kLanes];  // column c of S': rows lane + 8 q
#pragma unroll
  for (int q = 0; q < kPanel / kLanes; ++q) inverse[q] = T(0);
  const auto invert = [&](int k, T tau) {  // row k, from those above it and row k of X'X; none for k = -1
    T sum = T(0);
#pragma unroll
    for (int q = 0; q < kPanel / kLanes; ++q) sum += gram[(k & 1) * kPanel + lane + kLanes * q] * inverse[q];
    sum = column_sum(sum);
    const T value = tau * ((k == c ? T(1) : T(0)) - sum);
#pragma unroll
    for (int q = 0; q < kPanel / kLanes; ++q)
      if (k == lane + kLanes * q) inverse[q] = value;
  };

  // Of this column, once its step has come: y = own_over x.
  T own_over = T(0), own_tau = T(2), own_shrink = T(0), own_growth = T(0), tau = T(2);
#pragma unroll 2
  for (int j = 0; j < kPanel; ++j) {
    __syncthreads();  // one in a step: what is written in a step is read in the next
    T first[kHeld];
    load_column(first, shown + (j & 1) * kMostRows);
    const T given = A[j * kTileLd + c], a = fabs(A[j * kTileLd + j]) * scales[j];
    const T sigma = column_sum(product(first, first)), with = column_sum(product(first, x));
    invert(j - 1, tau);                     // fills the time of what follows
    const bool kept = !(sigma < T(kTiny));  // what is not a number stays so
    T over_length;
    const T length = root(a * a + sigma, over_length), over = kept ? reciprocal(a + length) : T(0);
    const T growth = sigma * over, square = growth * over;  // of the diagonal; |y|^2
    tau = kept ? T(1) + a * over_length : T(2);
    const T old = given * scale, change = tau * (with * over - square * old);
    const T both = over * (old + (old + change));
    __syncwarp();  // `given` has been read
    if (c > j) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) x[i] -= first[i] * both;
      if (c == j + 1) show_column(shown + (~j & 1) * kMostRows, x);
      if (lane == 0) A[j * kTileLd + c] = given + change * back;
    }
    if (lane == 0) gram[(j & 1) * kPanel + c] = c < j ? with * over * own_over : T(0);
    own_over = c == j ? over : own_over;
    own_tau = c == j ? tau : own_tau;
    own_shrink = c == j ? tau * square : own_shrink;
    own_growth = c == j ? growth : own_growth;
  }
  __syncthreads();
  invert(kPanel - 1, tau);
  if (lane == 0) {
    A[c * kTileLd + c] = fabs(A[c * kTileLd + c]) + own_growth * back;
    out.tau()[c] = own_tau;
    out.shrink()[c] = own_shrink;
  }
  store_column(out.x() + c * kMostRows, x, own_over);
#pragma unroll
  for (int q = 0; q < kPanel / kLanes; ++q) {
    const int r = lane + kLanes * q;
    out.l()[c * kPanel + r] = r > c ? inverse[q] : T(0);
  }
  __syncthreads();
}

}  // namespace rlsedit
