// Rows appended to a triangular system on a stream.
#pragma once

#include "tensors.h"

namespace rlsedit {

// For every matrix of the batch: [R B] <- top of Q'[R B; K V], R (d, d) upper triangular, K (u, d); with v >
// 0 also B (d, v) and V (u, v).
template <class E>
void append(Call& call, Matrices<typename E::T> R, Matrices<typename E::T> B, Matrices<const typename E::T> K,
            Matrices<const typename E::T> V, int64_t d, int64_t u, int64_t v);

}  // namespace rlsedit
