// cholesky(A) -> L, info
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "factor.h"
#include "parallel.h"
#include "tensors.h"

namespace rlsedit {
namespace {

std::tuple<Tensor, Tensor> cholesky(Tensor A) {
  const char* op = "cholesky";
  check_floating(op, "A", A);
  check_square(op, "A", A);
  const int64_t u = columns(A);
  Tensor L = new_output(A, {u, u}), info = new_info(A);
  int32_t* infos = static_cast<int32_t*>(info.mutable_data_ptr());
  for_dtype(A, [&](auto zero) {
    using T = decltype(zero);
    const auto make = [&] { return Factor<T>(u); };
    for_each_element(batch_count(A), u * u * u / 6, make, [&](int64_t b, Factor<T>& factor) {
      const Matrix<const T> from = matrix<const T>(A, b);
      T* to = matrix<T>(L, b).data;
      for (int64_t i = 0; i < u; ++i)
        for (int64_t j = 0; j <= i; ++j) to[i * u + j] = *from.at(i, j);
      infos[b] = static_cast<int32_t>(factor(to));
    });
  });
  return {L, info};
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("cholesky", TORCH_BOX(&rlsedit::cholesky));
}
