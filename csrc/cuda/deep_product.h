// Small products that a chain of blocks waits for: made for latency, where `multiply` (mma.h) is for large
// ones.
#pragma once

#include "mma.h"

namespace rlsedit {

// 16 bytes at a time.
template <class T>
struct alignas(16) Wide {
  static constexpr int kCount = 16 / int(sizeof(T));
  T v[kCount];
};

// A warp's 16 x 8 NT tile over `depth` (a multiple of 8 STEPS) terms, as `multiply`; STEPS times 8 terms are
// under way at once, so that a tensor core's latency is waited for once in so many. IEEE float32 has no need
// of it.
template <class E, int NT, int STEPS, bool TURNED>
RLSEDIT_DEVICE void deep_product(typename E::T (&sum)[1][NT][4], const typename E::T* left, int left_ld,
                                 const typename E::T* right, int right_ld, int depth) {
  constexpr int kTerms = E::kStep == 1 ? 8 : 8 * STEPS;
#pragma unroll 1
  for (int k = 0; k < depth; k += kTerms) {
#pragma unroll
    for (int i = k; i < k + kTerms; i += E::kStep) {
      const typename E::Left a = E::left(left + i, left_ld);
#pragma unroll
      for (int n = 0; n < NT; ++n)
        E::multiply(sum[0][n], a,
                    E::template right<TURNED>(right + place<TURNED>(8 * n, i, right_ld), right_ld));
    }
  }
}

}  // namespace rlsedit
