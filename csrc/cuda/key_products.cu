// key_products(A, K) -> K A, for a few rows K and any matrix A
//
//              d              n
//      +---------------+    +----+
//    u |  ===[K]====>  |  d | A  |  =  K A
//      +---------------+    +----+
//
//   1. K A: a block takes 128 keys (16 where there are no more) and 64 (128) columns of A, and a part of d
//   2. the parts added in a fixed order, or taken from V in it: V - K A
// A (d, n) with adjacent columns, or adjacent rows (the transpose of the weight of an nn.Linear).
// Bytes: d n; flops 2 d n u.
#include "key_products.h"

#include <type_traits>

#include "tile.h"
#include "warpgroup_product.h"

namespace rlsedit {
namespace {

template <class E, bool FEW, bool TURNED>
struct KeyProductTile {
  using Product = TileProduct<E, 4, 2, 2, 4, TURNED>;
};
template <class E, bool TURNED>
struct KeyProductTile<E, true, TURNED> {
  using Product = TileProduct<E, 1, 8, 1, 2, TURNED>;
};
template <class E, bool FEW, bool TURNED>
using KeyProduct = typename KeyProductTile<E, FEW, TURNED>::Product;

// K A over rows [begin, end) of A: parts (b, splits, u, n). `right` is A, or its transpose where TURNED is
// false.
template <class E, bool FEW, bool TURNED>
__global__ void __launch_bounds__(256)
    product_kernel(Matrices<const typename E::T> K, Matrices<const typename E::T> right, typename E::T* parts,
                   int64_t d, int64_t u, int64_t n, int splits, int64_t depth, int stages) {
  using T = typename E::T;
  using P = KeyProduct<E, FEW, TURNED>;
  const int64_t b = blockIdx.z, split = blockIdx.y % splits, row = blockIdx.y / splits * P::kRows;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * P::kColumns, begin = split * depth;
  P product;
  clear(product.sum);
  product.add(K[b], row, u, right[b], column, n, begin, lesser<int64_t>(d, begin + depth), shared_memory<T>(),
              stages);
  T* to = parts + (b * splits + split) * u * n;
  product.each_pair([&](int i, int j, T x, T y) { put_pair(to, row + i, column + j, u, n, x, y); });
}

// V less the parts, or the sum of the parts where there is no V. They are (b, splits, u, n), or (b, splits,
// n, u) where TURNED; threads go along them.
template <class T, bool TURNED>
__global__ void __launch_bounds__(256)
    innovation_kernel(Matrices<const T> V, const T* parts, T* to, int64_t u, int64_t n, int splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, b = blockIdx.z;
  if (i >= u * n) return;
  const T* from = parts + b * splits * u * n + i;
  T sum = from[0];
  for (int s = 1; s < splits; ++s) sum += from[s * u * n];
  const int64_t row = TURNED ? i % u : i / n, column = TURNED ? i / u : i % n;
  to[(b * u + row) * n + column] = V.data ? V[b].at(row, column) - sum : sum;
}

template <class T, bool TURNED>
void add_parts(Call& call, Matrices<const T> V, const T* parts, T* to, int64_t u, int64_t n, int splits) {
  launch(innovation_kernel<T, TURNED>,
         dim3(static_cast<unsigned>(ceil_div(u * n, 256)), 1, static_cast<unsigned>(call.batch())), 256, 0,
         call.stream(), V, parts, to, u, n, splits);
}

// (K A)' = A' K' by wgmma, where A' has adjacent columns (the weight of an nn.Linear); whether it was formed.
template <class E>
bool form_by_warpgroups(Call& call, const Matrices<const typename E::T>& A,
                        const Matrices<const typename E::T>& K, const Matrices<const typename E::T>& V,
                        int64_t d, int64_t u, int64_t n, typename E::T* to) {
  if constexpr (std::is_same_v<E, Tf32x3>) {
    Matrices<const float> turned = A;
    turned.rs = A.cs;
    turned.cs = A.rs;
    if (!takes_warpgroups(call, turned, u)) return false;
    int splits = 1;
    const float* parts = warpgroup_products(call, turned, K, n, d, u, nullptr, splits);
    add_parts<float, true>(call, V, parts, to, u, n, splits);
    return true;
  }
  return false;
}

template <class E, bool FEW, bool TURNED>
void form(Call& call, Matrices<const typename E::T> A, Matrices<const typename E::T> K,
          Matrices<const typename E::T> V, int64_t d, int64_t u, int64_t n, typename E::T* to) {
  using T = typename E::T;
  using P = KeyProduct<E, FEW, TURNED>;
  if constexpr (!TURNED) {
    const int64_t stride = A.rs;
    A.rs = A.cs;
    A.cs = stride;
  }
  const int64_t batch = call.batch(), across = ceil_div(n, P::kColumns), down = ceil_div(u, P::kRows);
  const int64_t wanted = ceil_div(512, greater<int64_t>(across * down * batch, 1)),
                most = greater<int64_t>(1, d / 256);
  int64_t splits = lesser(lesser<int64_t>(greater<int64_t>(wanted, 1), 16), most);
  const int64_t depth = ceil_div(ceil_div(d, splits), P::kDepth) * P::kDepth;
  splits = ceil_div(d, depth);
  T* parts = call.scratch<T>(batch * splits * u * n);
  const int stages = call.stages(P::kBufferBytes);
  const unsigned z = static_cast<unsigned>(batch);
  launch(product_kernel<E, FEW, TURNED>,
         dim3(static_cast<unsigned>(across), static_cast<unsigned>(down * splits), z), P::kThreads,
         stages * P::kBufferBytes, call.stream(), K, A, parts, d, u, n, static_cast<int>(splits), depth,
         stages);
  add_parts<T, false>(call, V, static_cast<const T*>(parts), to, u, n, static_cast<int>(splits));
}

}  // namespace

template <class E>
void form_key_products(Call& call, Matrices<const typename E::T> A, Matrices<const typename E::T> K,
                       const Matrices<const typename E::T>* targets, int64_t d, int64_t u, int64_t n,
                       typename E::T* to) {
  const Matrices<const typename E::T> V =
      targets ? *targets : Matrices<const typename E::T>{nullptr, 0, 0, 0, {0}, {0}};
  const bool by_columns = A.rs == 1 && A.cs != 1;
  if (form_by_warpgroups<E>(call, A, K, V, d, u, n, to))
    ;
  else if (u <= 16)
    by_columns ? form<E, true, false>(call, A, K, V, d, u, n, to)
               : form<E, true, true>(call, A, K, V, d, u, n, to);
  else
    by_columns ? form<E, false, false>(call, A, K, V, d, u, n, to)
               : form<E, false, true>(call, A, K, V, d, u, n, to);
}

#define RLSEDIT_INSTANTIATE(E)                                                          \
  template void form_key_products<E>(Call&, Matrices<const E::T>, Matrices<const E::T>, \
                                     const Matrices<const E::T>*, int64_t, int64_t, int64_t, E::T*);
RLSEDIT_INSTANTIATE(Tf32x3)
RLSEDIT_INSTANTIATE(Ffma)
RLSEDIT_INSTANTIATE(Dmma)
#undef RLSEDIT_INSTANTIATE

Tensor key_products(Tensor A, Tensor K, int64_t precision) {
  Call call("key_products", "A", A);
  call.floating("K", K);
  const int64_t d = rows(A), n = columns(A), u = rows(K);
  call.shape("A", A, -1, -1);
  call.shape("K", K, -1, d);
  Tensor Y = call.empty({u, n});
  with_engine(call, precision, [&](auto engine) {
    using E = decltype(engine);
    using T = typename E::T;
    form_key_products<E>(call, call.matrices<const T>(A), call.matrices<const T>(K), nullptr, d, u, n,
                         data<T>(Y));
  });
  return Y;
}

}  // namespace rlsedit

RLSEDIT_IMPL(key_products)
