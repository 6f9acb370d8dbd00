// downdate_(C, Z, alpha): C <- C + alpha Z Z' in place
#include <torch/csrc/stable/library.h>

#include "parallel.h"
#include "products.h"
#include "tensors.h"

namespace rlsedit {
namespace {

// Z as both operands of its product.
template <class T>
struct Operands {
  Operands(int64_t d, int64_t u) : left(left_size<T>(d, u)), right(right_size<T>(d, u)) {}
  Panels<T> left, right;
};

void downdate_(Tensor C, Tensor Z, double alpha) {
  const char* op = "downdate_";
  check_floating(op, "C", C);
  check_square(op, "C", C);
  check_writable(op, "C", C);
  check_alike(op, "Z", Z, "C", C);
  const int64_t d = columns(C), u = columns(Z);
  check_shape(op, "Z", Z, C, d, -1);
  for_dtype(C, [&](auto zero) {
    using T = decltype(zero);
    const auto make = [&] { return Operands<T>(d, u); };
    for_each_element(batch_count(C), d * d * u / 2, make, [&](int64_t b, Operands<T>& z) {
      pack_left(matrix<const T>(Z, b), d, u, z.left);
      pack_right(matrix<const T>(Z, b), d, u, z.right);
      lower_product(z.left, z.right, static_cast<T>(alpha), T(1), by_rows(matrix<T>(C, b)), true, kTile);
    });
  });
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("downdate_", TORCH_BOX(&rlsedit::downdate_));
}
