// qr_append_(R, K): R'R <- R'R + K'K for an upper triangular R: qr_append_rhs_ without a right-hand side.
//
//    R   +---+---+---+    a ticket owns 32 columns of R and of K: for every panel before its own it
//        | 0 | . | j |    waits until that is reduced, corrects its tile there and its part of K; then
//    K   +---+---+---+    it reduces its own
//
// Bytes: 4 d^2 (float32: the upper half of R, read and written), the rows once, block reflectors from the
// second-level cache; flops 2 d^2 u.
#include "qr_append_rhs_.h"

namespace rlsedit {

void qr_append_(Tensor R, Tensor K, int64_t precision) {
  Call call("qr_append_", "R", R);
  call.square("R", R);
  call.writable("R", R);
  call.floating("K", K);
  const int64_t d = columns(R), u = rows(K);
  call.shape("K", K, -1, d);
  with_engine(call, precision, [&](auto engine) {
    using E = decltype(engine);
    using T = typename E::T;
    append<E>(call, call.matrices<T>(R), Matrices<T>{}, call.matrices<const T>(K), Matrices<const T>{}, d, u,
              0);
  });
}

}  // namespace rlsedit

RLSEDIT_IMPL(qr_append_)
