// Products A K' of float32 by wgmma, for many columns of K' and a left matrix of adjacent columns.
#pragma once

#include "tensors.h"

namespace rlsedit {

// Whether these products are asked for (RLSEDIT_CUDA_WGMMA=1), can be had, and pay: A (rows, d), K (u, d).
bool takes_warpgroups(const Call& call, const Matrices<const float>& A, int64_t u);

// A K' in parts (b, splits, rows, u) over d, which are to be added in their order; `whole`, where not null,
// takes them if it is one. Returns where they are.
const float* warpgroup_products(Call& call, const Matrices<const float>& A, const Matrices<const float>& K,
                                int64_t rows, int64_t d, int64_t u, float* whole, int& splits);

}  // namespace rlsedit
