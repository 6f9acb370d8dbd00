// C <- scale (C + alpha Z Z') on a stream.
#pragma once

#include "tensors.h"

namespace rlsedit {

// For every matrix of the batch whose info is 0 (all, without `info`): C (d, d) symmetric in place, Z (d, u).
template <class E>
void change(Call& call, Matrices<typename E::T> C, Matrices<const typename E::T> Z, int64_t d, int64_t u,
            double alpha, double scale, const int32_t* info);

}  // namespace rlsedit
