// weight_update_(W, K, V, gain): E = V - K W, then W <- W + gain E in place
//
// Bytes: W read twice and written once; flops 4 d u v. W is changed tile by tile, along its rows or, where it
// is the transpose of an nn.Linear weight, its columns.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "key_products.h"
#include "tensors.h"

namespace rlsedit {
namespace {

// W (m x n) <- W + A B' for A (m x u) and B (n x u), along the rows of W; left and right are to hold A and B.
template <class T>
void add_product(Matrix<const T> A, Matrix<const T> B, int64_t m, int64_t n, int64_t u, Matrix<T> W,
                 Panels<T>& left, Panels<T>& right) {
  const Engine<T>& e = engine<T>();
  if (2 * u <= e.few && W.cs == 1) {
    const T* a = rows_of(A, m, u, left.memory.get());
    const T* b = rows_of(B.transposed(), u, n, right.memory.get());
    constexpr int64_t kRows = 64;
    for_each_task((m + kRows - 1) / kRows, [&](int64_t task) {
      const int64_t i = task * kRows;
      e.add_few(W.at(i, 0), W.rs, std::min(kRows, m - i), n, a + i * u, u, b, n, u);
    });
    return;
  }
  pack_left(A, m, u, left);
  pack_right(B, n, u, right);
  const int64_t down = (m + kTile - 1) / kTile, across = (n + kTile - 1) / kTile;
  for_each_task(down * across, [&](int64_t task) {
    const int64_t i0 = task / across * kTile, j0 = task % across * kTile;
    e.tile({left.panel(i0 / e.mr), left.stride, right.panel(j0 / e.nr), right.stride, std::min(kTile, m - i0),
            std::min(kTile, n - j0), u, T(1), T(1), W.at(i0, j0), W.rs, W.cs, false, nullptr});
  });
}

Tensor weight_update_(Tensor W, Tensor K, Tensor V, Tensor gain) {
  const char* op = "weight_update_";
  check_floating(op, "W", W);
  check_writable(op, "W", W);
  check_alike(op, "K", K, "W", W);
  check_alike(op, "V", V, "W", W);
  check_alike(op, "gain", gain, "W", W);
  const int64_t d = rows(W), v = columns(W), u = rows(K);
  check_shape(op, "K", K, W, -1, d);
  check_shape(op, "V", V, W, u, v);
  check_shape(op, "gain", gain, W, d, u);
  Tensor E = new_output(W, {u, v});
  for_dtype(W, [&](auto zero) {
    using T = decltype(zero);
    const auto make = [&] { return KeyProducts<T>(u, d, v); };
    for_each_element(batch_count(W), 2 * d * u * v, make, [&](int64_t b, KeyProducts<T>& products) {
      const Matrix<T> w = matrix<T>(W, b), error = matrix<T>(E, b);
      const Matrix<const T> targets = matrix<const T>(V, b);
      form_key_products<T>({w.data, w.rs, w.cs}, matrix<const T>(K, b), &targets, products, error.data);
      const Matrix<const T> g = matrix<const T>(gain, b), turned{error.data, 1, v};
      Panels<T>&d_rows = products.keys, &v_rows = products.turned;
      if (w.rs == 1 && w.cs != 1)
        add_product(turned, g, v, d, u, w.transposed(), v_rows, d_rows);
      else
        add_product(g, turned, d, v, u, w, d_rows, v_rows);
    });
  });
  return E;
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("weight_update_", TORCH_BOX(&rlsedit::weight_update_));
}
