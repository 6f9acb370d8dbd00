// weight_update_(W, K, V, gain) -> E = V - K W, and W <- W + gain E in place: what a batch does to the weight
//
//              u              v             v
//      +---------------+    +----+        +----+
//    d | ==[gain]===>  |  u | E  |  +=  d | [] |  W
//      +---------------+    +----+        +----+
//
//   1. E, as key_products.cu has it
//   2. W: a block takes a tile of 128 x 64, adds gain E
// W (d, v) in row form with adjacent columns, or adjacent rows (the transpose of the weight of an nn.Linear).
// Bytes: 3 d v; flops 4 d v u.
#include "key_products.h"
#include "tile.h"

namespace rlsedit {
namespace {

template <class E>
using Update = TileProduct<E, 4, 2, 2, 4, true>;

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
  form_key_products<E>(call, from, K, &V, d, u, v, errors);
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
