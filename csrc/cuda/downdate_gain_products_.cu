// downdate_gain_products_(C, Z, K, alpha): C <- C + alpha Z Z' in place, then Y = C K', G = K Y of the new C
//
// Up to 32 keys and 32 columns of Z, where memory decides: one pass. A block owns 64 rows; it walks along
// them tile by tile, changes each tile, writes it back and multiplies it with the keys while it is in
// shared memory:
//
//             +------+------+------+----
//     rows I: | C_I0 | C_I1 | C_IJ | ..      C_IJ += alpha Z_I Z_J' ;  Y_I += C_IJ K_J'
//             +------+------+------+----
//
// No tile is touched by two blocks, so nothing waits. A tile above the diagonal is formed as the transpose of
// the one below, from the same numbers in the same order: C stays exactly symmetric although both halves are
// computed. Bytes: 2 d^2, against 2.5 d^2 of the two ops; flops 4 d^2 u, against 3 d^2 u: beyond 32 keys the
// two ops run one after the other.
#include "downdate_.h"
#include "gain_products.h"
#include "tile.h"

namespace rlsedit {
namespace {

constexpr int kRows = 64, kKeys = 32, kThreads = 256;

// Shared memory: Z_I, and twice Z_J, C_IJ and K_J; 4 elements of padding (tile.h).
constexpr int kRootLd = kKeys + 4, kSquareLd = kRows + 4;
constexpr int kRoot = kRows * kRootLd, kSquare = kRows * kSquareLd, kKey = kKeys * kSquareLd;
constexpr int kBuffer = kRoot + kSquare + kKey;
template <class T>
constexpr size_t kBytes = (kRoot + 2 * kBuffer) * sizeof(T);

template <class E>
__global__ void __launch_bounds__(kThreads)
    pass_kernel(Matrices<typename E::T> Cs, Matrices<const typename E::T> Zs,
                Matrices<const typename E::T> Ks, typename E::T* Ys, int64_t d, int64_t w, int64_t u,
                typename E::T alpha) {
  using T = typename E::T;
  const int64_t b = blockIdx.z, own = blockIdx.x, row = own * kRows, blocks = gridDim.x;
  const Matrix<T> C = Cs[b];
  const Matrix<const T> Z = Zs[b], K = Ks[b], old{C.data, C.rs, C.cs};
  const bool wide_z = wide(Z), wide_k = wide(K), wide_c = wide(C);
  T *roots = shared_memory<T>(), *buffers = roots + kRoot;
  const auto fetch = [&](int64_t other) {
    T* to = buffers + other % 2 * kBuffer;
    const int64_t column = other * kRows;
    copy_tile<kKeys, kRootLd, kThreads>(to, kRows, Z, wide_z, column, 0, d, w);
    copy_tile<kRows, kSquareLd, kThreads>(to + kRoot, kRows, old, wide_c, row, column, d, d);
    copy_tile<kRows, kSquareLd, kThreads>(to + kRoot + kSquare, kKeys, K, wide_k, 0, column, u, d);
    copy_commit();
  };
  copy_tile<kKeys, kRootLd, kThreads>(roots, kRows, Z, wide_z, row, 0, d, w);
  fetch(0);
  const int depth = static_cast<int>(ceil_div(w, 8) * 8);
  const int m = warp_index() >> 2, n = warp_index() & 3;                      // of the change: 2 x 4 warps
  const int rows = 16 * (warp_index() >> 1), keys = 16 * (warp_index() & 1);  // of Y: 4 x 2
  T Y[1][2][4];
  clear(Y);
  for (int64_t other = 0; other < blocks; ++other) {
    copy_wait<0>();
    __syncthreads();
    if (other + 1 < blocks) fetch(other + 1);
    T *theirs = buffers + other % 2 * kBuffer, *tile = theirs + kRoot, *their_keys = tile + kSquare;
    const bool above = own < other, on = own == other;
    const T *low = above ? theirs : roots, *high = above ? roots : theirs;
    T change[2][2][4];
    clear(change);
    multiply<E, 2, 2, false>(change, low + 32 * m * kRootLd, kRootLd, high + 16 * n * kRootLd, kRootLd,
                             depth);
    for_each_sum(change, [&](int i, int j, T value) {
      const int r = 32 * m + i, c = 16 * n + j;
      if (on && c > r) return;
      T* at = above ? tile + c * kSquareLd + r : tile + r * kSquareLd + c;
      const T now = fma(alpha, value, *at);
      *at = now;
      if (on) tile[c * kSquareLd + r] = now;
    });
    __syncthreads();
    const int64_t column = other * kRows;
    constexpr int kWide = 16 / sizeof(T), kAcross = kRows / kWide;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kAcross; i += kThreads) {
      const int r = i / kAcross, c = i % kAcross * kWide;
      if (row + r >= d) continue;
      const T* from = tile + r * kSquareLd + c;
      if (wide_c && column + c + kWide <= d) {
        *reinterpret_cast<int4*>(&C.at(row + r, column + c)) = *reinterpret_cast<const int4*>(from);
      } else {
#pragma unroll
        for (int k = 0; k < kWide; ++k)
          if (column + c + k < d) C.at(row + r, column + c + k) = from[k];
      }
    }
    multiply<E, 1, 2, false>(Y, tile + rows * kSquareLd, kSquareLd, their_keys + keys * kSquareLd, kSquareLd,
                             kRows);
  }
  for_each_sum(Y, [&](int i, int j, T value) {
    const int64_t r = row + rows + i, c = keys + j;
    if (r < d && c < u) Ys[b * d * u + r * u + c] = value;
  });
}

}  // namespace

std::tuple<Tensor, Tensor> downdate_gain_products_(Tensor C, Tensor Z, Tensor K, double alpha,
                                                   int64_t precision) {
  Call call("downdate_gain_products_", "C", C);
  call.square("C", C);
  call.writable("C", C);
  call.floating("Z", Z);
  call.floating("K", K);
  const int64_t d = columns(C), u = rows(K), w = columns(Z);
  call.shape("Z", Z, d, -1);
  call.shape("K", K, -1, d);
  Tensor Y = call.empty({d, u}), G = call.empty({u, u});
  with_engine(call, precision, [&](auto engine) {
    using E = decltype(engine);
    using T = typename E::T;
    const Matrices<T> matrices = call.matrices<T>(C);
    const Matrices<const T> keys = call.matrices<const T>(K), roots = call.matrices<const T>(Z);
    if (u <= kKeys && w <= kKeys && static_cast<int64_t>(kBytes<T>) <= call.most_shared()) {
      const dim3 grid(static_cast<unsigned>(ceil_div(d, kRows)), 1, static_cast<unsigned>(call.batch()));
      launch(pass_kernel<E>, grid, kThreads, kBytes<T>, call.stream(), by_rows(matrices), roots, keys,
             data<T>(Y), d, w, u, static_cast<T>(alpha));
      form_gram<E>(call, keys, data<T>(Y), d, u, data<T>(G));
    } else {
      change<E>(call, matrices, roots, d, w, alpha, 1.0, nullptr);
      form_gain_products<E>(call, call.matrices<const T>(C), keys, d, u, data<T>(Y), data<T>(G));
    }
  });
  return {Y, G};
}

}  // namespace rlsedit

RLSEDIT_IMPL(downdate_gain_products_)
