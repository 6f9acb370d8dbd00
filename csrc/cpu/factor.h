// Cholesky factor of a small matrix, and what follows from it for the gain.
#pragma once

#include "matrix.h"

namespace rlsedit {

// Lower factor of A (u x u, row-major) in place, from and into its lower triangle; the upper one becomes
// zero. Returns LAPACK's info: 0, or the order of the first leading minor that is not positive (or not
// finite).
template <class T>
int64_t factor(T* A, int64_t u);

// gain = Y (L L')^-1 and Z = Y L^-T from the right panels of Y (d x u), which become those of Z.
// gain and Z (d x u) are row-major; Z may be null; with `left`, Z is also packed as a left operand.
template <class T>
void solve_gain(const T* L, Panels<T>& Y, T* gain, T* Z, Panels<T>* left);

// rows x u, row-major <- the right panels of Y.
template <class T>
void unpack(const Panels<T>& Y, T* out);

template <class T>
void fill_nan(T* data, int64_t count);

}  // namespace rlsedit
