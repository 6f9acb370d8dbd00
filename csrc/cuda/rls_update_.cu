// rls_update_(C, K, noise, forget): the whole commit, with L L' = forget noise I + K C K',
//   Z = C K' L^-T,  gain = Z L^-1,  C <- (C - Z Z') / forget where info == 0
//
//    C (d, d) ==> Y (d, u) -> G (u, u) -> V = L^-1 (u, u)      tiles: 128 rows of C; 64 x 64 of G;
//                     |                       |                one matrix; 64 rows of Y;
//                     +---------> Z, gain <---+   ==> C        lower 128 x 128 of C, mirrored
//
// Six launches (seven where few blocks share the pass over C), no look at info, workspace from torch's
// allocator: a captured graph replays it. Bytes: 2.5 d^2 and about 8 d u; flops 3 d^2 u + 3 d u^2.
#include "downdate_.h"
#include "gain_products.h"
#include "gain_solve.h"

namespace rlsedit {

std::tuple<Tensor, Tensor> rls_update_(Tensor C, Tensor K, double noise, double forget, int64_t precision) {
  Call call("rls_update_", "C", C);
  call.square("C", C);
  call.writable("C", C);
  call.floating("K", K);
  const int64_t d = columns(C), u = rows(K), batch = call.batch();
  call.shape("K", K, -1, d);
  call.require(noise >= 0.0, "noise must be at least 0");
  call.require(forget > 0.0 && forget <= 1.0, "forget must be in (0, 1]");
  Tensor gain = call.empty({d, u}), info = call.info();
  with_engine(call, precision, [&](auto engine) {
    using E = decltype(engine);
    using T = typename E::T;
    T *Y = call.scratch<T>(batch * d * u), *Z = call.scratch<T>(batch * d * u),
      *G = call.scratch<T>(batch * u * u);
    int32_t* infos = data<int32_t>(info);
    form_gain_products<E>(call, call.matrices<const T>(C), call.matrices<const T>(K), d, u, Y, G);
    solve_gain<E>(call, stacked<const T>(Y, d, u), stacked<const T>(G, u, u), d, u, forget * noise,
                  data<T>(gain), Z, infos);
    change<E>(call, call.matrices<T>(C), stacked<const T>(Z, d, u), d, u, -1.0, 1.0 / forget, infos);
  });
  return {gain, info};
}

}  // namespace rlsedit

RLSEDIT_IMPL(rls_update_)
