// K A and V - K A on a stream, for a few rows K.
#pragma once

#include "tensors.h"

namespace rlsedit {

// For every matrix of the batch: A (d, n), K (u, d), to (u, n) contiguous, V - K A where there is a V.
template <class E>
void form_key_products(Call& call, Matrices<const typename E::T> A, Matrices<const typename E::T> K,
                       const Matrices<const typename E::T>* V, int64_t d, int64_t u, int64_t n,
                       typename E::T* to);

}  // namespace rlsedit
