// qr_append_rhs_(R, B, K, V): the rotation of qr_append_ applied to the right-hand side as well, [R B; K V]
#include <torch/csrc/stable/library.h>

#include "parallel.h"
#include "reflectors.h"
#include "tensors.h"

namespace rlsedit {
namespace {

void qr_append_rhs_(Tensor R, Tensor B, Tensor K, Tensor V) {
  const char* op = "qr_append_rhs_";
  check_floating(op, "R", R);
  check_square(op, "R", R);
  check_writable(op, "R", R);
  check_alike(op, "B", B, "R", R);
  check_writable(op, "B", B);
  check_alike(op, "K", K, "R", R);
  check_alike(op, "V", V, "R", R);
  const int64_t d = columns(R), u = rows(K), v = columns(B);
  check_shape(op, "B", B, R, d, -1);
  check_shape(op, "K", K, R, -1, d);
  check_shape(op, "V", V, R, u, v);
  for_dtype(R, [&](auto zero) {
    using T = decltype(zero);
    const auto make = [&] { return Append<T>(d, u, v); };
    for_each_element(batch_count(R), d * u * (d + 2 * v), make, [&](int64_t b, Append<T>& append) {
      append.run(matrix<T>(R, b), matrix<const T>(K, b), matrix<T>(B, b), matrix<const T>(V, b));
    });
  });
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("qr_append_rhs_", TORCH_BOX(&rlsedit::qr_append_rhs_));
}
