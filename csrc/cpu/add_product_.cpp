// add_product_(A, left, right, alpha): A <- A + alpha left right' in place, the second half of weight_update_
//
// No op of the package, since cuBLAS has it for a GPU: what states take on a CPU in the place of torch's
// product. Bytes: A read and written once; flops 2 m n k.
#include <torch/csrc/stable/library.h>

#include "add_product.h"
#include "tensors.h"

namespace rlsedit {
namespace {

// Both operands, each of them on either side.
template <class T>
struct Sides {
  Sides(int64_t m, int64_t n, int64_t k) : left(operand_size<T>(m, k)), right(operand_size<T>(n, k)) {}
  Panels<T> left, right;
};

void add_product_(Tensor A, Tensor left, Tensor right, double alpha) {
  const char* op = "add_product_";
  check_floating(op, "A", A);
  check_writable(op, "A", A);
  check_alike(op, "left", left, "A", A);
  check_alike(op, "right", right, "A", A);
  const int64_t m = rows(A), n = columns(A), k = columns(left);
  check_shape(op, "A", A, A, -1, -1);
  check_shape(op, "left", left, A, m, -1);
  check_shape(op, "right", right, A, n, k);
  for_dtype(A, [&](auto zero) {
    using T = decltype(zero);
    const auto make = [&] { return Sides<T>(m, n, k); };
    for_each_element(batch_count(A), m * n * k, make, [&](int64_t b, Sides<T>& sides) {
      add_product(matrix<const T>(left, b), matrix<const T>(right, b), m, n, k, static_cast<T>(alpha),
                  matrix<T>(A, b), sides.left, sides.right);
    });
  });
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("add_product_", TORCH_BOX(&rlsedit::add_product_));
}
