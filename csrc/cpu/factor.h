// Cholesky factor of a small matrix, and what follows from it for the gain.
#pragma once

#include "matrix.h"

namespace rlsedit {

// Lower factor of A (u x u, row-major) in place, from and into its lower triangle; the upper one becomes
// zero. Returns LAPACK's info: 0, or the order of the first leading minor that is not positive (or not
// finite).
template <class T>
class Factor {
 public:
  explicit Factor(int64_t u);  // takes all memory
  int64_t operator()(T* A);

 private:
  int64_t u_;
  Panels<T> left_, right_;
};

// gain = Y (L L')^-1 and Z = Y L^-T, row-major (d x u), from the right panels of Y, which are used up.
template <class T>
void solve_gain(const T* L, const Panels<T>& Y, T* gain, T* Z);

// The same with Z as both operands of the downdate: the right panels of Y become those of Z.
template <class T>
class Solves {
 public:
  Solves(int64_t d, int64_t u);  // takes all memory
  void operator()(const T* L, const Panels<T>& Y, T* gain, Panels<T>& left) const;

 private:
  int64_t tasks_, workers_;
  Scratch<T> second_;
};

// rows x u, row-major <- the right panels of Y.
template <class T>
void unpack(const Panels<T>& Y, T* out);

template <class T>
void fill_nan(T* data, int64_t count);

}  // namespace rlsedit
