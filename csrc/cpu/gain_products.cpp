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
    for_each_element(batch_count(C), d * d * u, [&](int64_t b) {
      const Panels<T> keys = pack_left(matrix<const T>(K, b), u, d);
      const Panels<T> products = covariance_times_keys(matrix<const T>(C, b), keys);
      unpack(products, matrix<T>(Y, b).data);
      gram(keys, products, matrix<T>(G, b));
    });
  });
  return {Y, G};
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("gain_products", TORCH_BOX(&rlsedit::gain_products));
}
