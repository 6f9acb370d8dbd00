// gain_products(C, K) -> Y = C K', G = K Y
//
//              d                     keys
//      +---------------+            +--+
//    d |  ===[C]====>  | x   K'  =  |Y_|   a block takes 128 rows of C and up to 112 keys
//      +---------------+            +--+
//
//   1. Y: a block walks along its rows; where there are few blocks, several share a walk, each leaving a part
//      of Y, and the parts are added in a fixed order
//   2. G: a block takes a lower 64 x 64 tile and a part of d
//   3. the parts of G are added in a fixed order, and the tile is mirrored
//
// No atomics: the same bits from run to run, G exactly symmetric. Bytes: d^2 of C once for u <= 112, and K
// once per block from the second-level cache; flops 2 d^2 u + d u^2.
#include "gain_products.h"

#include <type_traits>

#include "tile.h"
#include "warpgroup_product.h"

namespace rlsedit {
namespace {

template <class E, int NT>
using Product = TileProduct<E, 4, 2, 2, NT, false>;

// Part `blockIdx.y / key blocks` of a block of Y; parts (b, splits, d, u), or Y itself if it is one.
template <class E, int NT>
__global__ void __launch_bounds__(Product<E, NT>::kThreads, E::kBlocks)
    product_kernel(Matrices<const typename E::T> C, Matrices<const typename E::T> K, typename E::T* parts,
                   int64_t d, int64_t u, int splits, int64_t depth, int stages) {
  using T = typename E::T;
  using P = Product<E, NT>;
  const int blocks = static_cast<int>(gridDim.y) / splits, split = static_cast<int>(blockIdx.y) / blocks;
  const int64_t b = blockIdx.z, row = static_cast<int64_t>(blockIdx.x) * P::kRows;
  const int64_t key = static_cast<int64_t>(blockIdx.y % blocks) * P::kColumns;
  const int64_t begin = split * depth, end = lesser<int64_t>(d, begin + depth);
  P product;
  clear(product.sum);
  product.add(C[b], row, d, K[b], key, u, begin, end, shared_memory<T>(), stages);
  T* to = parts + (b * splits + split) * d * u;
  product.each_pair([&](int i, int j, T x, T y) { put_pair(to, row + i, key + j, d, u, x, y); });
}

// sum_s parts[b][s][i], s in ascending order.
template <class T>
__global__ void __launch_bounds__(256) add_parts_kernel(const T* parts, T* Y, int64_t count, int splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, b = blockIdx.z;
  if (i >= count) return;
  const T* from = parts + b * splits * count + i;
  T sum = from[0];
  for (int s = 1; s < splits; ++s) sum += from[s * count];
  Y[b * count + i] = sum;
}

template <class T>
void add_parts(Call& call, const T* parts, T* Y, int64_t count, int splits) {
  launch(add_parts_kernel<T>,
         dim3(static_cast<unsigned>(ceil_div(count, 256)), 1, static_cast<unsigned>(call.batch())), 256, 0,
         call.stream(), parts, Y, count, splits);
}

// By wgmma, where it is to be had (Hopper); whether Y was formed.
template <class E>
bool form_by_warpgroups(Call& call, const Matrices<const typename E::T>& C,
                        const Matrices<const typename E::T>& K, int64_t d, int64_t u, typename E::T* Y) {
  if constexpr (std::is_same_v<E, Tf32x3>) {
    if (!takes_warpgroups(call, C, u)) return false;
    int splits = 1;
    const float* parts = warpgroup_products(call, C, K, d, d, u, Y, splits);
    if (splits > 1) add_parts(call, parts, Y, d * u, splits);
    return true;
  }
  return false;
}

template <class E>
using Gram = TileProduct<E, 2, 2, 2, 4, true>;

// Parts are workspace: no more of them than give every multiprocessor enough to do.
constexpr int64_t kMostParts = 1 << 26;  // elements of the parts of Y
constexpr int64_t kGramBlocks = 4096;    // blocks that form parts of G

// What rows [begin, end) of d add to a lower tile of G; parts (b, splits, u, u).
template <class E>
__global__ void __launch_bounds__(Gram<E>::kThreads)
    gram_kernel(Matrices<const typename E::T> K, const typename E::T* Y, typename E::T* parts, int64_t d,
                int64_t u, int64_t depth, int stages) {
  using T = typename E::T;
  using P = Gram<E>;
  const int64_t b = blockIdx.z, split = blockIdx.y;
  int i0, j0;
  lower_tile(static_cast<int>(blockIdx.x), i0, j0);
  const int64_t row = static_cast<int64_t>(i0) * P::kRows, column = static_cast<int64_t>(j0) * P::kColumns;
  const int64_t begin = split * depth, end = lesser<int64_t>(d, begin + depth);
  P product;
  clear(product.sum);
  product.add(K[b], row, u, Matrix<const T>{Y + b * d * u, u, 1}, column, u, begin, end, shared_memory<T>(),
              stages);
  T* to = parts + (b * gridDim.y + split) * u * u;
  product.each_pair([&](int i, int j, T x, T y) { put_pair(to, row + i, column + j, u, u, x, y); });
}

// G[i][j] = G[j][i] = sum_s parts[b][s][i][j] for i >= j, s in ascending order, in float64.
template <class T>
__global__ void __launch_bounds__(256) add_gram_kernel(const T* parts, T* G, int64_t u, int splits) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, b = blockIdx.z;
  const int64_t i = place / u, j = place % u;
  if (i >= u || j > i) return;
  const T* from = parts + b * splits * u * u + place;
  double sum = 0.0;
#pragma unroll 8
  for (int s = 0; s < splits; ++s) sum += static_cast<double>(from[s * u * u]);
  G[b * u * u + i * u + j] = static_cast<T>(sum);
  G[b * u * u + j * u + i] = static_cast<T>(sum);
}

template <class E, int NT>
void form_products(Call& call, Matrices<const typename E::T> C, Matrices<const typename E::T> K, int64_t d,
                   int64_t u, typename E::T* Y) {
  using T = typename E::T;
  using P = Product<E, NT>;
  const int64_t batch = call.batch(), rows = ceil_div(d, P::kRows), keys = ceil_div(u, P::kColumns);
  int64_t splits = best_splits(rows * keys * batch, E::kBlocks * call.processors(), d, batch * d * u);
  const int64_t depth = ceil_div(ceil_div(d, splits), P::kDepth) * P::kDepth;
  splits = ceil_div(d, depth);
  T* parts = splits == 1 ? Y : call.scratch<T>(batch * splits * d * u);
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(keys * splits),
                  static_cast<unsigned>(batch));
  const int stages = call.stages(P::kBufferBytes);
  launch(product_kernel<E, NT>, grid, P::kThreads, stages * P::kBufferBytes, call.stream(), C, K, parts, d, u,
         static_cast<int>(splits), depth, stages);
  if (splits > 1) add_parts(call, static_cast<const T*>(parts), Y, d * u, static_cast<int>(splits));
}

}  // namespace

int64_t best_splits(int64_t blocks, int64_t places, int64_t d, int64_t part) {
  const int64_t most = lesser(lesser<int64_t>(d / 256, 8), kMostParts / greater<int64_t>(1, part));
  int64_t best = 1;
  double least = 0.0;
  for (int64_t splits = 1; splits <= greater<int64_t>(1, most); ++splits) {
    const double rounds = static_cast<double>(ceil_div(blocks * splits, places));
    const double cost = rounds / static_cast<double>(splits) * (1.0 + 0.01 * static_cast<double>(splits));
    if (splits == 1 || cost < least) {
      least = cost;
      best = splits;
    }
  }
  return best;
}

template <class E>
void form_gram(Call& call, Matrices<const typename E::T> K, const typename E::T* Y, int64_t d, int64_t u,
               typename E::T* G) {
  using T = typename E::T;
  using P = Gram<E>;
  const int64_t batch = call.batch(), side = ceil_div(u, P::kRows), tiles = side * (side + 1) / 2;
  const int64_t most =
      lesser<int64_t>(64, greater<int64_t>(1, kGramBlocks / greater<int64_t>(1, tiles * batch)));
  const int64_t depth = greater<int64_t>(128, ceil_div(ceil_div(d, most), 32) * 32),
                splits = ceil_div(d, depth);
  T* parts = call.scratch<T>(batch * splits * u * u);
  const int stages = call.stages(P::kBufferBytes);
  const unsigned z = static_cast<unsigned>(batch);
  launch(gram_kernel<E>, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(splits), z), P::kThreads,
         stages * P::kBufferBytes, call.stream(), K, Y, parts, d, u, depth, stages);
  launch(add_gram_kernel<T>, dim3(static_cast<unsigned>(ceil_div(u * u, 256)), 1, z), 256, 0, call.stream(),
         static_cast<const T*>(parts), G, u, static_cast<int>(splits));
}

template <class E>
void form_gain_products(Call& call, Matrices<const typename E::T> C, Matrices<const typename E::T> K,
                        int64_t d, int64_t u, typename E::T* Y, typename E::T* G) {
  C = by_rows(C);
  if (form_by_warpgroups<E>(call, C, K, d, u, Y))
    ;
  else if (u <= 16)
    form_products<E, 1>(call, C, K, d, u, Y);
  else if (u <= 32)
    form_products<E, 2>(call, C, K, d, u, Y);
  else if (u <= 64)
    form_products<E, 4>(call, C, K, d, u, Y);
  else
    form_products<E, 7>(call, C, K, d, u, Y);
  form_gram<E>(call, K, Y, d, u, G);
}

#define RLSEDIT_INSTANTIATE(E)                                                                             \
  template void form_gain_products<E>(Call&, Matrices<const E::T>, Matrices<const E::T>, int64_t, int64_t, \
                                      E::T*, E::T*);                                                       \
  template void form_gram<E>(Call&, Matrices<const E::T>, const E::T*, int64_t, int64_t, E::T*);
RLSEDIT_INSTANTIATE(Tf32x3)
RLSEDIT_INSTANTIATE(Ffma)
RLSEDIT_INSTANTIATE(Dmma)
#undef RLSEDIT_INSTANTIATE

std::tuple<Tensor, Tensor> gain_products(Tensor C, Tensor K, int64_t precision) {
  Call call("gain_products", "C", C);
  call.square("C", C);
  call.floating("K", K);
  const int64_t d = columns(C), u = rows(K);
  call.shape("K", K, -1, d);
  Tensor Y = call.empty({d, u}), G = call.empty({u, u});
  with_engine(call, precision, [&](auto engine) {
    using E = decltype(engine);
    using T = typename E::T;
    form_gain_products<E>(call, call.matrices<const T>(C), call.matrices<const T>(K), d, u, data<T>(Y),
                          data<T>(G));
  });
  return {Y, G};
}

}  // namespace rlsedit

RLSEDIT_IMPL(gain_products)
