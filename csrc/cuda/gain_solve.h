// gain = Y (noise I + G)^-1 and Z = Y L^-T on a stream.
#pragma once

#include "tensors.h"

namespace rlsedit {

// For every matrix of the batch: Y (d, u), G (u, u); gain and Z (d, u) contiguous, NaN where info != 0.
template <class E>
void solve_gain(Call& call, Matrices<const typename E::T> Y, Matrices<const typename E::T> G, int64_t d,
                int64_t u, double noise, typename E::T* gain, typename E::T* Z, int32_t* info);

}  // namespace rlsedit
