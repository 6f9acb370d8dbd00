// qr_append_(R, K): R'R <- R'R + K'K for an upper triangular R
#include <torch/csrc/stable/library.h>

#include "parallel.h"
#include "reflectors.h"
#include "tensors.h"

namespace rlsedit {
namespace {

void qr_append_(Tensor R, Tensor K) {
  const char* op = "qr_append_";
  check_floating(op, "R", R);
  check_square(op, "R", R);
  check_writable(op, "R", R);
  check_alike(op, "K", K, "R", R);
  const int64_t d = columns(R), u = rows(K);
  check_shape(op, "K", K, R, -1, d);
  for_dtype(R, [&](auto zero) {
    using T = decltype(zero);
    const auto make = [&] { return Append<T>(d, u, 0); };
    for_each_element(batch_count(R), d * d * u, make, [&](int64_t b, Append<T>& append) {
      append.run(matrix<T>(R, b), matrix<const T>(K, b), {nullptr, 0, 0}, {nullptr, 0, 0});
    });
  });
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("qr_append_", TORCH_BOX(&rlsedit::qr_append_));
}
