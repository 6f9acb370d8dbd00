// downdate_(C, Z, alpha): C <- C + alpha Z Z' in place
#include <torch/csrc/stable/library.h>

#include "parallel.h"
#include "products.h"
#include "tensors.h"

namespace rlsedit {
namespace {

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
    for_each_element(batch_count(C), d * d * u / 2, [&](int64_t b) {
      const Matrix<const T> z = matrix<const T>(Z, b);
      const Panels<T> left = pack_left(z, d, u), right = pack_right(z, d, u);
      lower_product(left, right, static_cast<T>(alpha), T(1), by_rows(matrix<T>(C, b)), true, kTile);
    });
  });
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("downdate_", TORCH_BOX(&rlsedit::downdate_));
}
