// gain_solve(Y, G, noise) -> gain = Y (noise I + G)^-1, Z = Y L^-T, info, with L L' = noise I + G
//
// Two launches. The first factors and inverts (cholesky.cu). In the second a block takes 64 rows of Y, and
// with V = L^-1
//
//               K <= J                 J                       K >= J                J
//             +---------+           +-----+                  +---------+         +--------+
//     rows of | Y_K ==> |  V_JK' =  | Z_J |          rows of | Z_K ==> | V_KJ =  | gain_J |
//             +---------+           +-----+                  +---------+         +--------+
//
//     Z_J    = sum_{K <= J} Y_K V_JK'      tiles of 64 keys
//     gain_J = sum_{K >= J} Z_K V_KJ       Z comes back from the cache, after a barrier
// Bytes: 3 d u; flops 2 d u^2.
#include "gain_solve.h"

#include <type_traits>

#include "cholesky.h"
#include "tile.h"

namespace rlsedit {
namespace {

constexpr int64_t kFew = 32;

template <class E, bool TURNED>
using Product = TileProduct<E, 2, 2, 2, 4, TURNED>;

template <class E>
constexpr size_t kSolveBuffer = greater(Product<E, false>::kBufferBytes, Product<E, true>::kBufferBytes);

template <class E>
__global__ void __launch_bounds__(Product<E, false>::kThreads)
    solve_kernel(Matrices<const typename E::T> Ys, const typename E::T* Vs, const int32_t* info,
                 typename E::T* gains, typename E::T* Zs, int64_t d, int64_t u, int stages) {
  using T = typename E::T;
  constexpr int kKeys = Product<E, false>::kColumns;
  const int64_t b = blockIdx.z, row = static_cast<int64_t>(blockIdx.x) * Product<E, false>::kRows;
  const Matrix<const T> Y = Ys[b], V{Vs + b * u * u, u, 1};
  T *Z = Zs + b * d * u, *gain = gains + b * d * u, *memory = shared_memory<T>();
  const T spoiled =
      info[b] == 0 ? T(0) : static_cast<T>(NAN);  // makes sure that nobody mistakes it for a gain
  for (int64_t first = 0; first < u; first += kKeys) {
    Product<E, false> product;
    clear(product.sum);
    product.add(Y, row, d, V, first, u, 0, lesser<int64_t>(u, first + kKeys), memory, stages);
    product.each_pair(
        [&](int i, int j, T x, T y) { put_pair(Z, row + i, first + j, d, u, x + spoiled, y + spoiled); });
  }
  __syncthreads();
  for (int64_t first = 0; first < u; first += kKeys) {
    Product<E, true> product;
    clear(product.sum);
    product.add(Matrix<const T>{Z, u, 1}, row, d, V, first, u, first, u, memory, stages);
    product.each_pair(
        [&](int i, int j, T x, T y) { put_pair(gain, row + i, first + j, d, u, x + spoiled, y + spoiled); });
  }
}

}  // namespace

template <class E>
void solve_gain(Call& call, Matrices<const typename E::T> Y, Matrices<const typename E::T> G, int64_t d,
                int64_t u, double noise, typename E::T* gain, typename E::T* Z, int32_t* info) {
  using T = typename E::T;
  using P = Product<E, false>;
  if constexpr (std::is_same_v<E, Tf32x3>) {
    // Sums of few terms do not average what three products of tf32 leave out, and cost nothing in IEEE
    // arithmetic.
    if (u <= kFew) return solve_gain<Ffma>(call, Y, G, d, u, noise, gain, Z, info);
  }
  const int64_t batch = call.batch();
  T* V = call.scratch<T>(batch * u * u);
  factor<E>(call, G, u, noise, nullptr, V, info);
  const int stages = call.stages(kSolveBuffer<E>);
  launch(solve_kernel<E>, dim3(static_cast<unsigned>(ceil_div(d, P::kRows)), 1, static_cast<unsigned>(batch)),
         P::kThreads, stages * kSolveBuffer<E>, call.stream(), Y, static_cast<const T*>(V),
         static_cast<const int32_t*>(info), gain, Z, d, u, stages);
}

#define RLSEDIT_INSTANTIATE(E)                                                                             \
  template void solve_gain<E>(Call&, Matrices<const E::T>, Matrices<const E::T>, int64_t, int64_t, double, \
                              E::T*, E::T*, int32_t*);
RLSEDIT_INSTANTIATE(Ffma)
RLSEDIT_INSTANTIATE(Tf32x3)
RLSEDIT_INSTANTIATE(Dmma)
#undef RLSEDIT_INSTANTIATE

std::tuple<Tensor, Tensor, Tensor> gain_solve(Tensor Y, Tensor G, double noise, int64_t precision) {
  Call call("gain_solve", "Y", Y);
  call.shape("Y", Y, -1, -1);
  call.floating("G", G);
  const int64_t d = rows(Y), u = columns(Y);
  call.shape("G", G, u, u);
  call.require(noise >= 0.0, "noise must be at least 0");
  Tensor gain = call.empty({d, u}), Z = call.empty({d, u}), info = call.info();
  with_engine(call, precision, [&](auto engine) {
    using E = decltype(engine);
    using T = typename E::T;
    solve_gain<E>(call, call.matrices<const T>(Y), call.matrices<const T>(G), d, u, noise, data<T>(gain),
                  data<T>(Z), data<int32_t>(info));
  });
  return {gain, Z, info};
}

}  // namespace rlsedit

RLSEDIT_IMPL(gain_solve)
