// cholesky(A) -> L, info: L L' = A
//
// One block a matrix, in tiles of 32 x 32 that stay in shared memory (u up to 288, 192 in float64; else in
// global memory, where they stay in the second-level cache):
//
//      | D       |   D: one warp, a row a lane, 32 steps of shuffles
//      | P  T    |   P <- P D^-T   a row a thread, by substitution
//      | P  T T  |   T <- T - P P' a tile a warp, on the tensor cores
//
// The first warp takes the next D from T and factors it while the others take the rest of T (look-ahead).
//
// The inverse, for those who need it, replaces the factor: diagonal tiles by substitution, a column a lane,
// then block row by block row V_ij = -V_ii sum_k L_ik V_kj. Flops u^3 / 3, twice that with the inverse; what
// it takes is the latency of u column steps. Bytes: u^2 / 2 of A, u^2 of L and as many of the inverse.
#include "cholesky.h"

#include "tile.h"
#include "triangle.h"

namespace rlsedit {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <class T>
RLSEDIT_DEVICE T* tile_of(T* tiles, int i, int j) {
  return tiles + (static_cast<int64_t>(i) * (i + 1) / 2 + j) * kTileSize;
}

// f(i, j, row, column) for all elements of the lower tiles: a tile a warp, a row at a time, several rows
// under way.
template <class F>
RLSEDIT_DEVICE void for_each_element(int side, const F& f) {
  for (int index = warp_index(); index < side * (side + 1) / 2; index += kWarps) {
    int i, j;
    lower_tile(index, i, j);
#pragma unroll 8
    for (int r = 0; r < kSide; ++r) f(i, j, r, lane_index());
  }
}

// T_ij -= P_i P_j' behind block column k, by a warp.
template <class E>
RLSEDIT_DEVICE void update_tile(typename E::T* tiles, int k, int i, int j) {
  using T = typename E::T;
  T sum[2][4][4];
  clear(sum);
  multiply<E, 2, 4, false>(sum, tile_of(tiles, i, k), kTileLd, tile_of(tiles, j, k), kTileLd, kSide);
  T* to = tile_of(tiles, i, j);
  for_each_sum(sum, [&](int r, int c, T value) { to[r * kTileLd + c] -= value; });
}

// All of them but the first, dealt out to the warps but the first.
template <class E>
RLSEDIT_DEVICE void update_trailing(typename E::T* tiles, int k, int side) {
  const int n = side - 1 - k;
  for (int index = warp_index(); index < n * (n + 1) / 2; index += kWarps - 1) {
    int i, j;
    lower_tile(index, i, j);
    update_tile<E>(tiles, k, i + k + 1, j + k + 1);
  }
}

// The inverse of the factor, in its place.
template <class E>
RLSEDIT_DEVICE void invert(typename E::T* tiles, int side) {
  using T = typename E::T;
  for (int i = warp_index(); i < side; i += kWarps) invert_triangle(tile_of(tiles, i, i));
  __syncthreads();
  for (int i = 1; i < side; ++i) {
    // Ascending j: tile (i, j) is overwritten when only tiles further right are still to be read as L.
    for (int first = 0; first < i; first += kWarps) {
      const int j = first + warp_index();
      T sum[2][4][4];
      clear(sum);
      for (int k = j; k < i; ++k)
        multiply<E, 2, 4, true>(sum, tile_of(tiles, i, k), kTileLd, tile_of(tiles, k, j), kTileLd, kSide);
      __syncthreads();
      if (j < i) {
        T* to = tile_of(tiles, i, j);
        for_each_sum(sum, [&](int r, int c, T value) { to[r * kTileLd + c] = value; });
        __syncwarp();
        clear(sum);
        multiply<E, 2, 4, true>(sum, tile_of(tiles, i, i), kTileLd, to, kTileLd, kSide);
        __syncwarp();
        for_each_sum(sum, [&](int r, int c, T value) { to[r * kTileLd + c] = -value; });
      }
    }
    __syncthreads();
  }
}

template <class T>
RLSEDIT_DEVICE void store(const T* tiles, int side, int64_t u, T* to) {
  for_each_element(side, [&](int i, int j, int r, int c) {
    const int64_t row = i * kSide + r, column = j * kSide + c;
    if (row >= u || column >= u) return;
    to[row * u + column] = row >= column ? tile_of(tiles, i, j)[r * kTileLd + c] : T(0);
  });
  for_each_element(side, [&](int i, int j, int r, int c) {  // and the tiles above the diagonal
    const int64_t row = j * kSide + r, column = i * kSide + c;
    if (i > j && row < u && column < u) to[row * u + column] = T(0);
  });
}

// Tiles in shared memory, which the compiler then knows; or in `room`, global memory for those of every
// matrix.
template <class E, bool SHARED>
__global__ void __launch_bounds__(kThreads)
    factor_kernel(Matrices<const typename E::T> As, typename E::T* L, typename E::T* V, int32_t* info,
                  typename E::T* room, int64_t u, typename E::T noise) {
  using T = typename E::T;
  const int64_t b = blockIdx.x;
  const int side = static_cast<int>(ceil_div(u, kSide));
  T* tiles;
  if constexpr (SHARED)
    tiles = shared_memory<T>();
  else
    tiles = room + b * (side * (side + 1) / 2) * kTileSize;
  const Matrix<const T> A = As[b];
  for_each_element(side, [&](int i, int j, int r, int c) {
    const int64_t row = i * kSide + r, column = j * kSide + c;
    T value = row == column ? T(1) : T(0);  // beyond u: the identity
    if (row < u && column <= row) value = A.at(row, column) + (row == column ? noise : T(0));
    tile_of(tiles, i, j)[r * kTileLd + c] = value;
  });
  int bad = 0;
  __syncthreads();
  if (warp_index() == 0) factor_triangle(tiles, 0, bad);
  for (int k = 0; k + 1 < side; ++k) {
    __syncthreads();
    for (int r = static_cast<int>(threadIdx.x); r < (side - 1 - k) * kSide; r += kThreads)
      solve_row(tile_of(tiles, k + 1 + r / kSide, k) + r % kSide * kTileLd, tile_of(tiles, k, k));
    __syncthreads();
    if (warp_index() > 0) {
      update_trailing<E>(tiles, k, side);
      continue;
    }
    update_tile<E>(tiles, k, k + 1, k + 1);
    __syncwarp();
    factor_triangle(tile_of(tiles, k + 1, k + 1), (k + 1) * kSide, bad);
  }
  __syncthreads();
  if (L != nullptr) store(tiles, side, u, L + b * u * u);
  if (V != nullptr) {
    __syncthreads();
    invert<E>(tiles, side);
    store(tiles, side, u, V + b * u * u);
  }
  if (threadIdx.x == 0) info[b] = bad;
}

}  // namespace

template <class E>
void factor(Call& call, Matrices<const typename E::T> A, int64_t u, double noise, typename E::T* L,
            typename E::T* V, int32_t* info) {
  using T = typename E::T;
  const int64_t side = ceil_div(u, kSide), size = side * (side + 1) / 2 * kTileSize, batch = call.batch();
  const bool fits = size * static_cast<int64_t>(sizeof(T)) <= call.most_shared();
  T* room = fits ? nullptr : call.scratch<T>(batch * size);
  launch(fits ? factor_kernel<E, true> : factor_kernel<E, false>, dim3(static_cast<unsigned>(batch)),
         kThreads, fits ? static_cast<size_t>(size) * sizeof(T) : 0, call.stream(), A, L, V, info, room, u,
         static_cast<T>(noise));
}

#define RLSEDIT_INSTANTIATE(E) \
  template void factor<E>(Call&, Matrices<const E::T>, int64_t, double, E::T*, E::T*, int32_t*);
RLSEDIT_INSTANTIATE(Tf32x3)
RLSEDIT_INSTANTIATE(Ffma)
RLSEDIT_INSTANTIATE(Dmma)
#undef RLSEDIT_INSTANTIATE

std::tuple<Tensor, Tensor> cholesky(Tensor A, int64_t precision) {
  Call call("cholesky", "A", A);
  call.square("A", A);
  const int64_t u = columns(A);
  Tensor L = call.empty({u, u}), info = call.info();
  with_engine(call, precision, [&](auto engine) {
    using E = decltype(engine);
    using T = typename E::T;
    factor<E>(call, call.matrices<const T>(A), u, 0.0, data<T>(L), nullptr, data<int32_t>(info));
  });
  return {L, info};
}

}  // namespace rlsedit

RLSEDIT_IMPL(cholesky)
