// downdate_gain_products_(C, Z, K, alpha): C <- C + alpha Z Z' in place, then Y = C K', G = K Y of the new C
//
// On a CPU both halves are bound by arithmetic (u >= 16): the pass over memory that a fusion would save is a
// tenth of the time, and it would need partial sums of Y per thread. So the halves run one after the other.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "factor.h"
#include "parallel.h"
#include "products.h"
#include "tensors.h"

namespace rlsedit {
namespace {

// Of a downdate by w columns and the products that follow.
template <class T>
struct Space {
  Space(int64_t d, int64_t w, int64_t u)
      : left(left_size<T>(d, w)), right(right_size<T>(d, w)), products(u, d, d) {}
  Panels<T> left, right;
  KeyProducts<T> products;
};

std::tuple<Tensor, Tensor> downdate_gain_products_(Tensor C, Tensor Z, Tensor K, double alpha) {
  const char* op = "downdate_gain_products_";
  check_floating(op, "C", C);
  check_square(op, "C", C);
  check_writable(op, "C", C);
  check_alike(op, "Z", Z, "C", C);
  check_alike(op, "K", K, "C", C);
  const int64_t d = columns(C), w = columns(Z), u = rows(K);
  check_shape(op, "Z", Z, C, d, -1);
  check_shape(op, "K", K, C, -1, d);
  Tensor Y = new_output(C, {d, u}), G = new_output(C, {u, u});
  for_dtype(C, [&](auto zero) {
    using T = decltype(zero);
    const auto make = [&] { return Space<T>(d, w, u); };
    for_each_element(batch_count(C), d * d * (u + w / 2), make, [&](int64_t b, Space<T>& space) {
      KeyProducts<T>& products = space.products;
      products.pack(matrix<const T>(K, b));
      pack_left(matrix<const T>(Z, b), d, w, space.left);
      pack_right(matrix<const T>(Z, b), d, w, space.right);
      lower_product(space.left, space.right, static_cast<T>(alpha), T(1), by_rows(matrix<T>(C, b)), true,
                    kTile);
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
  m.impl("downdate_gain_products_", TORCH_BOX(&rlsedit::downdate_gain_products_));
}
