// L L' = A + noise I on a stream, and the inverse of L.
#pragma once

#include "tensors.h"

namespace rlsedit {

// For every matrix of the batch: A (u, u), of which the lower triangle is read. L and V = L^-1 (u, u)
// contiguous, zero above the diagonal, either may be null; info 0, or k + 1 where pivot k is the first that
// is not positive and finite.
template <class E>
void factor(Call& call, Matrices<const typename E::T> A, int64_t u, double noise, typename E::T* L,
            typename E::T* V, int32_t* info);

}  // namespace rlsedit
