// weight_update_(W, K, V, gain) -> E = V - K W, and W <- W + gain E in place: what a batch does to the weight
//
//   1. K W: a block takes 128 keys (16 where there are no more) and 64 (128) columns of W, and a part of d
//   2. E = V - the parts, added in a fixed order
//   3. W: a block takes a tile of 128 x 64, adds gain E
// W (d, v) in row form with adjacent columns, or adjacent rows (the transpose of the weight of an nn.Linear).
// Bytes: 3 d v; flops 4 d v u.
#include <type_traits>

#include "tensors.h"
#include "tile.h"
#include "warpgroup_product.h"

namespace rlsedit {
namespace {

template <class E, bool FEW, bool TURNED>
struct InnovationTile {
  using Product = TileProduct<E, 4, 2, 2, 4, TURNED>;
};
template <class E, bool TURNED>
struct InnovationTile<E, true, TURNED> {
  using Product = TileProduct<E, 1, 8, 1, 2, TURNED>;
};
template <class E, bool FEW, bool TURNED>
using Innovation = typename InnovationTile<E, FEW, TURNED>::Product;
template <class E>
using Update = TileProduct<E, 4, 2, 2, 4, true>;

// K W over rows [begin, end) of W: parts (b, splits, u, v). `right` is W, or its transpose where TURNED is
// false.
template <class E, bool FEW, bool TURNED>
__global__ void __launch_bounds__(256)
    product_kernel(Matrices<const typename E::T> K, Matrices<const typename E::T> right, typename E::T* parts,
                   int64_t d, int64_t u, int64_t v, int splits, int64_t depth, int stages) {
  using T = typename E::T;
  using P = Innovation<E, FEW, TURNED>;
  const int64_t b = blockIdx.z, split = blockIdx.y % splits, row = blockIdx.y / splits * P::kRows;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * P::kColumns, begin = split * depth;
  P product;
  clear(product.sum);
  product.add(K[b], row, u, right[b], column, v, begin, lesser<int64_t>(d, begin + depth), shared_memory<T>(),
              stages);
  T* to = parts + (b * splits + split) * u * v;
  product.each_pair([&](int i, int j, T x, T y) { put_pair(to, row + i, column + j, u, v, x, y); });
}

// The parts are (b, splits, u, v), or (b, splits, v, u) where TURNED; threads go along them.
template <class T, bool TURNED>
__global__ void __launch_bounds__(256)
    innovation_kernel(Matrices<const T> V, const T* parts, T* E, int64_t u, int64_t v, int splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, b = blockIdx.z;
  if (i >= u * v) return;
  const T* from = parts + b * splits * u * v + i;
  T sum = from[0];
  for (int s = 1; s < splits; ++s) sum += from[s * u * v];
  const int64_t row = TURNED ? i % u : i / v, column = TURNED ? i / u : i % v;
  E[(b * u + row) * v + column] = V[b].at(row, column) - sum;
}

template <class T, bool TURNED>
void subtract_parts(Call& call, Matrices<const T> V, const T* parts, T* errors, int64_t u, int64_t v,
                    int splits) {
  launch(innovation_kernel<T, TURNED>,
         dim3(static_cast<unsigned>(ceil_div(u * v, 256)), 1, static_cast<unsigned>(call.batch())), 256, 0,
         call.stream(), V, parts, errors, u, v, splits);
}

// (K W)' = W' K' by wgmma, where W' has adjacent columns (the weight of an nn.Linear); whether it was formed.
template <class E>
bool form_by_warpgroups(Call& call, const Matrices<const typename E::T>& W,
                        const Matrices<const typename E::T>& K, const Matrices<const typename E::T>& V,
                        int64_t d, int64_t u, int64_t v, typename E::T* errors) {
  if constexpr (std::is_same_v<E, Tf32x3>) {
    Matrices<const float> turned = W;
    turned.rs = W.cs;
    turned.cs = W.rs;
    if (!takes_warpgroups(call, turned, u)) return false;
    int splits = 1;
    const float* parts = warpgroup_products(call, turned, K, v, d, u, nullptr, splits);
    subtract_parts<float, true>(call, V, parts, errors, u, v, splits);
    return true;
  }
  return false;
}

template <class E>
__global__ void __launch_bounds__(Update<E>::kThreads)
    update_kernel(Matrices<typename E::T> Ws, Matrices<const typename E::T> gain, const typename E::T* errors,
                  int64_t d, int64_t u, int64_t v, int stages) {
  using T = typename E::T;
  using P = Update<E>;
  const int64_t b = blockIdx.z, row = static_cast<int64_t>(blockIdx.y) * P::kRows;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * P::kColumns;
  const Matrix<T> W = Ws[b];
  prefetch_tile<P::kRows, P::kColumns, P::kThreads>(W, row, column, d, v);
  P product;
  clear(product.sum);
  product.add(gain[b], row, d, Matrix<const T>{errors + b * u * v, v, 1}, column, v, 0, u, shared_memory<T>(),
              stages);
  if (row + P::kRows <= d && column + P::kColumns <= v) {
    // All loads before the first store (downdate_.cu says why).
    if (paired(W)) {
      product.each_pair([&](int i, int j, T& x, T& y) {
        const Pair<T> old = *reinterpret_cast<const Pair<T>*>(&W.at(row + i, column + j));
        x += old.x;
        y += old.y;
      });
      product.each_pair([&](int i, int j, T x, T y) { store_adjacent(&W.at(row + i, column + j), {x, y}); });
      return;
    }
    product.each([&](int i, int j, T& value) { value += W.at(row + i, column + j); });
    product.each([&](int i, int j, T value) { W.at(row + i, column + j) = value; });
    return;
  }
  product.each([&](int i, int j, T value) {
    if (row + i < d && column + j < v) W.at(row + i, column + j) += value;
  });
}

template <class E, bool FEW, bool TURNED>
void form_innovation(Call& call, Matrices<const typename E::T> W, Matrices<const typename E::T> K,
                     Matrices<const typename E::T> V, int64_t d, int64_t u, int64_t v,
                     typename E::T* errors) {
  using T = typename E::T;
  using P = Innovation<E, FEW, TURNED>;
  if constexpr (!TURNED) {
    const int64_t stride = W.rs;
    W.rs = W.cs;
    W.cs = stride;
  }
  const int64_t batch = call.batch(), across = ceil_div(v, P::kColumns), down = ceil_div(u, P::kRows);
  const int64_t wanted = ceil_div(512, greater<int64_t>(across * down * batch, 1)),
                most = greater<int64_t>(1, d / 256);
  int64_t splits = lesser(lesser<int64_t>(greater<int64_t>(wanted, 1), 16), most);
  const int64_t depth = ceil_div(ceil_div(d, splits), P::kDepth) * P::kDepth;
  splits = ceil_div(d, depth);
  T* parts = call.scratch<T>(batch * splits * u * v);
  const int stages = call.stages(P::kBufferBytes);
  const unsigned z = static_cast<unsigned>(batch);
  launch(product_kernel<E, FEW, TURNED>,
         dim3(static_cast<unsigned>(across), static_cast<unsigned>(down * splits), z), P::kThreads,
         stages * P::kBufferBytes, call.stream(), K, W, parts, d, u, v, static_cast<int>(splits), depth,
         stages);
  subtract_parts<T, false>(call, V, static_cast<const T*>(parts), errors, u, v, static_cast<int>(splits));
}

template <class E>
void update_weight(Call& call, Matrices<typename E::T> W, Matrices<const typename E::T> K,
                   Matrices<const typename E::T> V, Matrices<const typename E::T> gain, int64_t d, int64_t u,
                   int64_t v, typename E::T* errors) {
  using T = typename E::T;
  using P = Update<E>;
  Matrices<const T> from{W.data, W.rs, W.cs, W.dims, {0}, {0}};
  for (int i = 0; i < W.dims; ++i) {
    from.sizes[i] = W.sizes[i];
    from.strides[i] = W.strides[i];
  }
  const bool by_columns = W.rs == 1 && W.cs != 1;
  if (form_by_warpgroups<E>(call, from, K, V, d, u, v, errors))
    ;
  else if (u <= 16)
    by_columns ? form_innovation<E, true, false>(call, from, K, V, d, u, v, errors)
               : form_innovation<E, true, true>(call, from, K, V, d, u, v, errors);
  else
    by_columns ? form_innovation<E, false, false>(call, from, K, V, d, u, v, errors)
               : form_innovation<E, false, true>(call, from, K, V, d, u, v, errors);
  const int stages = call.stages(P::kBufferBytes);
  const dim3 grid(static_cast<unsigned>(ceil_div(v, P::kColumns)),
                  static_cast<unsigned>(ceil_div(d, P::kRows)), static_cast<unsigned>(call.batch()));
  launch(update_kernel<E>, grid, P::kThreads, stages * P::kBufferBytes, call.stream(), W, gain,
         static_cast<const T*>(errors), d, u, v, stages);
}

}  // namespace

Tensor weight_update_(Tensor W, Tensor K, Tensor V, Tensor gain, int64_t precision) {
  Call call("weight_update_", "W", W);
  call.writable("W", W);
  call.floating("K", K);
  call.floating("V", V);
  call.floating("gain", gain);
  const int64_t d = rows(W), v = columns(W), u = rows(K);
  call.shape("W", W, -1, -1);
  call.shape("K", K, -1, d);
  call.shape("V", V, u, v);
  call.shape("gain", gain, d, u);
  Tensor errors = call.empty({u, v});
  with_engine(call, precision, [&](auto engine) {
    using E = decltype(engine);
    using T = typename E::T;
    update_weight<E>(call, call.matrices<T>(W), call.matrices<const T>(K), call.matrices<const T>(V),
                     call.matrices<const T>(gain), d, u, v, data<T>(errors));
  });
  return errors;
}

}  // namespace rlsedit

RLSEDIT_IMPL(weight_update_)
