// gain_products(C, K) -> Y = C K', G = K Y
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "factor.h"
#include "parallel.h"
#include "products.h"
#include "tensors.h"

namespace rlsedit {
namespace {

std::tuple<Tensor, Tensor> gain_products(Tensor C, Tensor K) {
  const char* op = "gain_products";
  check_floating(op, "C", C);
  check_square(op, "C", C);
  check_alike(op, "K", K, "C", C);
  const int64_t d = columns(C), u = rows(K);
  check_shape(op, "K", K, C, -1, d);
  Tensor Y = new_output(C, {d, u}), G = new_output(C, {u, u});
  for_dtype(C, [&](auto zero) {
    using T = decltype(zero);
    const auto make = [&] { return KeyProducts<T>(u, d, d); };
    for_each_element(batch_count(C), d * d * u, make, [&](int64_t b, KeyProducts<T>& products) {
      products.pack(matrix<const T>(K, b));
      products.multiply(by_rows(matrix<const T>(C, b)));
      unpack(products.Y, matrix<T>(Y, b).data);
      products.gram(matrix<T>(G, b));
    });
  });
  return {Y, G};
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("gain_products", TORCH_BOX(&rlsedit::gain_products));
}
