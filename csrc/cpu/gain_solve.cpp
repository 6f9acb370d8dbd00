// gain_solve(Y, G, noise) -> gain = Y (noise I + G)^-1, Z = Y L^-T, info, with L L' = noise I + G
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "factor.h"
#include "parallel.h"
#include "products.h"
#include "tensors.h"

namespace rlsedit {
namespace {

template <class T>
struct Space {
  Space(int64_t d, int64_t u) : L(u * u), factor(u), Y(right_size<T>(d, u)) {}
  Scratch<T> L;
  Factor<T> factor;
  Panels<T> Y;
};

std::tuple<Tensor, Tensor, Tensor> gain_solve(Tensor Y, Tensor G, double noise) {
  const char* op = "gain_solve";
  check_floating(op, "Y", Y);
  check_alike(op, "G", G, "Y", Y);
  const int64_t d = rows(Y), u = columns(Y);
  check_shape(op, "Y", Y, Y, -1, -1);
  check_shape(op, "G", G, Y, u, u);
  STD_TORCH_CHECK(noise >= 0.0, op, ": noise must be at least 0, got ", noise);
  Tensor gain = new_output(Y, {d, u}), Z = new_output(Y, {d, u}), info = new_info(Y);
  int32_t* infos = static_cast<int32_t*>(info.mutable_data_ptr());
  for_dtype(Y, [&](auto zero) {
    using T = decltype(zero);
    const auto make = [&] { return Space<T>(d, u); };
    for_each_element(batch_count(Y), d * u * u, make, [&](int64_t b, Space<T>& space) {
      const Matrix<const T> g = matrix<const T>(G, b);
      T* L = space.L.get();
      for (int64_t i = 0; i < u; ++i) {
        for (int64_t j = 0; j < i; ++j) L[i * u + j] = *g.at(i, j);
        L[i * u + i] = *g.at(i, i) + static_cast<T>(noise);
      }
      T *to_gain = matrix<T>(gain, b).data, *to_Z = matrix<T>(Z, b).data;
      infos[b] = static_cast<int32_t>(space.factor(L));
      if (infos[b] != 0) {  // no gain exists: make sure that nobody mistakes what is returned for one
        fill_nan(to_gain, d * u);
        fill_nan(to_Z, d * u);
        return;
      }
      pack_right(matrix<const T>(Y, b), d, u, space.Y);
      solve_gain(L, space.Y, to_gain, to_Z);
    });
  });
  return {gain, Z, info};
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("gain_solve", TORCH_BOX(&rlsedit::gain_solve));
}
