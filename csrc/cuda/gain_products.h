// Y = C K' and G = K Y on a stream.
#pragma once

#include "tensors.h"

namespace rlsedit {

// For every matrix of the batch: C (d, d) symmetric, K (u, d), Y (d, u) and G (u, u) contiguous.
template <class E>
void form_gain_products(Call& call, Matrices<const typename E::T> C, Matrices<const typename E::T> K,
                        int64_t d, int64_t u, typename E::T* Y, typename E::T* G);

// G = K Y alone, for a Y that is there.
template <class E>
void form_gram(Call& call, Matrices<const typename E::T> K, const typename E::T* Y, int64_t d, int64_t u,
               typename E::T* G);

// Into how many parts a walk along d is cut, so that `blocks` fill a GPU that holds `places` of them, in
// whole rounds; a part more costs about a hundredth, and `part` elements of workspace. The same on the same
// device: so are the bits of the result.
int64_t best_splits(int64_t blocks, int64_t places, int64_t d, int64_t part);

}  // namespace rlsedit
