// key_products(A, K) -> K A
//
// Bytes: A read once; flops 2 d u n.
#include "key_products.h"

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace rlsedit {
namespace {

Tensor key_products(Tensor A, Tensor K) {
  const char* op = "key_products";
  check_floating(op, "A", A);
  check_alike(op, "K", K, "A", A);
  const int64_t d = rows(A), n = columns(A), u = rows(K);
  check_shape(op, "A", A, A, -1, -1);
  check_shape(op, "K", K, A, -1, d);
  Tensor Y = new_output(A, {u, n});
  for_dtype(A, [&](auto zero) {
    using T = decltype(zero);
    const auto make = [&] { return KeyProducts<T>(u, d, n); };
    for_each_element(batch_count(A), d * u * n, make, [&](int64_t b, KeyProducts<T>& products) {
      form_key_products<T>(matrix<const T>(A, b), matrix<const T>(K, b), nullptr, products,
                           matrix<T>(Y, b).data);
    });
  });
  return Y;
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("key_products", TORCH_BOX(&rlsedit::key_products));
}
