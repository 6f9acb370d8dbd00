// rls_update_(C, K, noise, forget): the whole commit,
//   L L' = forget noise I + K C K',  Z = C K' L^-T,  gain = Z L^-1,  C <- (C - Z Z') / forget
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "factor.h"
#include "parallel.h"
#include "products.h"
#include "tensors.h"

namespace rlsedit {
namespace {

// One element of the batch; C is not written unless the factor exists.
template <class T>
class Update {
 public:
  Update(int64_t d, int64_t u) : products_(u, d, d), L_(u * u), factor_(u), solve_(d, u) {}

  int64_t run(Matrix<T> C, Matrix<const T> K, double noise, double forget, T* gain) {
    const int64_t d = products_.d, u = products_.u;
    T* L = L_.get();
    products_.pack(K);
    products_.multiply(by_rows(Matrix<const T>{C.data, C.rs, C.cs}));
    products_.gram({L, u, 1});
    for (int64_t i = 0; i < u; ++i) L[i * u + i] += static_cast<T>(forget * noise);
    if (const int64_t info = factor_(L)) {
      fill_nan(gain, d * u);
      return info;
    }
    Panels<T>&left = products_.turned, &Z = products_.Y;  // C K' up to here
    solve_(L, Z, gain, left);
    const T scale = static_cast<T>(1.0 / forget);
    lower_product(left, Z, -scale, scale, by_rows(C), true, kTile);
    return 0;
  }

 private:
  KeyProducts<T> products_;
  Scratch<T> L_;
  Factor<T> factor_;
  Solves<T> solve_;
};

std::tuple<Tensor, Tensor> rls_update_(Tensor C, Tensor K, double noise, double forget) {
  const char* op = "rls_update_";
  check_floating(op, "C", C);
  check_square(op, "C", C);
  check_writable(op, "C", C);
  check_alike(op, "K", K, "C", C);
  const int64_t d = columns(C), u = rows(K);
  check_shape(op, "K", K, C, -1, d);
  STD_TORCH_CHECK(noise >= 0.0, op, ": noise must be at least 0, got ", noise);
  STD_TORCH_CHECK(forget > 0.0 && forget <= 1.0, op, ": forget must be in (0, 1], got ", forget);
  Tensor gain = new_output(C, {d, u}), info = new_info(C);
  int32_t* infos = static_cast<int32_t*>(info.mutable_data_ptr());
  for_dtype(C, [&](auto zero) {
    using T = decltype(zero);
    const auto make = [&] { return Update<T>(d, u); };
    for_each_element(batch_count(C), d * d * u, make, [&](int64_t b, Update<T>& update) {
      T* to = matrix<T>(gain, b).data;
      infos[b] = static_cast<int32_t>(update.run(matrix<T>(C, b), matrix<const T>(K, b), noise, forget, to));
    });
  });
  return {gain, info};
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("rls_update_", TORCH_BOX(&rlsedit::rls_update_));
}
