// gain_solve(Y, G, noise) -> gain = Y (noise I + G)^-1, Z = Y L^-T, info, with L L' = noise I + G
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "factor.h"
#include "parallel.h"
#include "products.h"
#include "tensors.h"

namespace rlsedit {
namespace {

std::tuple<Tensor, Tensor, Tensor> gain_solve(Tensor Y, Tensor G, double noise) {
  const char* op = "gain_solve";
  check_floating(op, "Y", Y);
  check_alike(op, "G", G, "Y", Y);
  const int64_t d = rows(Y), u = columns(Y);
  check_shape(op, "Y", Y, Y, -1, -1);
  check_shape(op, "G", G, Y, u, u);
  Tensor gain = new_output(Y, {d, u}), Z = new_output(Y, {d, u}), info = new_info(Y);
  int32_t* infos = static_cast<int32_t*>(info.mutable_data_ptr());
  for_dtype(Y, [&](auto zero) {
    using T = decltype(zero);
    for_each_element(batch_count(Y), d * u * u, [&](int64_t b) {
      const Matrix<const T> g = matrix<const T>(G, b);
      const Scratch<T> L(u * u);
      for (int64_t i = 0; i < u; ++i) {
        for (int64_t j = 0; j < i; ++j) L.get()[i * u + j] = *g.at(i, j);
        L.get()[i * u + i] = *g.at(i, i) + static_cast<T>(noise);
      }
      T *to_gain = matrix<T>(gain, b).data, *to_Z = matrix<T>(Z, b).data;
      infos[b] = static_cast<int32_t>(factor(L.get(), u));
      if (infos[b] != 0) {  // no gain exists: make sure that nobody mistakes what is returned for one
        fill_nan(to_gain, d * u);
        fill_nan(to_Z, d * u);
        return;
      }
      Panels<T> panels = pack_right(matrix<const T>(Y, b), d, u);
      solve_gain(L.get(), panels, to_gain, to_Z, static_cast<Panels<T>*>(nullptr));
    });
  });
  return {gain, Z, info};
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("gain_solve", TORCH_BOX(&rlsedit::gain_solve));
}
