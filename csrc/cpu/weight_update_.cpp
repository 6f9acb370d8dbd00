// weight_update_(W, K, V, gain): E = V - K W, then W <- W + gain E in place
//
// Bytes: W read twice and written once; flops 4 d u v. W is changed tile by tile, along its rows or, where it
// is the transpose of an nn.Linear weight, its columns.
#include <torch/csrc/stable/library.h>

#include "add_product.h"
#include "key_products.h"
#include "tensors.h"

namespace rlsedit {
namespace {

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
      add_product(g, turned, d, v, u, T(1), w, d_rows, v_rows);
    });
  });
  return E;
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("weight_update_", TORCH_BOX(&rlsedit::weight_update_));
}
