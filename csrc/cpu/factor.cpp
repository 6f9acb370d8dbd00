#include "factor.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "parallel.h"
#include "products.h"

namespace rlsedit {

// Right-looking: factor a diagonal block, solve for the panel below, downdate what remains.
template <class T>
Factor<T>::Factor(int64_t u)
    : u_(u),
      left_(left_size<T>(std::max<int64_t>(0, u - kFactorBlock), kFactorBlock)),
      right_(right_size<T>(std::max<int64_t>(0, u - kFactorBlock), kFactorBlock)) {}

template <class T>
int64_t Factor<T>::operator()(T* A) {
  const Engine<T>& e = engine<T>();
  const int64_t u = u_;
  int64_t info = 0;
  for (int64_t j = 0; j < u; j += kFactorBlock) {
    const int64_t n = std::min(kFactorBlock, u - j), below = u - j - n;
    T* diagonal = A + j * u + j;
    if (const int64_t failed = e.factor(diagonal, u, n)) {
      info = j + failed;
      break;
    }
    if (below == 0) break;
    const Matrix<const T> panel{diagonal + n * u, u, 1};
    pack_right(panel, below, n, right_);
    for_each_task(right_.count(), [&](int64_t i) {
      e.solve_lower(right_.panel(i), diagonal, u, n);
      e.unpack_right(diagonal + (n + i * e.nr) * u, u, right_.panel(i), std::min(e.nr, below - i * e.nr), n);
    });
    pack_left(panel, below, n, left_);
    lower_product(left_, right_, T(-1), T(1), Matrix<T>{A + (j + n) * u + j + n, u, 1}, false,
                  small_tile<T>());
  }
  for (int64_t i = 0; i < u; ++i) std::fill(A + i * u + i + 1, A + (i + 1) * u, T(0));
  return info;
}

template <class T>
void solve_gain(const T* L, const Panels<T>& Y, T* gain, T* Z) {
  const Engine<T>& e = engine<T>();
  const int64_t u = Y.k;
  for_each_task(Y.count(), [&](int64_t i) {
    const int64_t row = i * e.nr, n = std::min(e.nr, Y.rows - row);
    e.solve_lower(Y.panel(i), L, u, u);
    e.unpack_right(Z + row * u, u, Y.panel(i), n, u);
    e.solve_upper(Y.panel(i), L, u, u);
    e.unpack_right(gain + row * u, u, Y.panel(i), n, u);
  });
}

// A task takes rows that are whole right and whole left panels.
template <class T>
Solves<T>::Solves(int64_t d, int64_t u)
    : tasks_((d + small_tile<T>() - 1) / small_tile<T>()),
      workers_(workers(tasks_)),
      second_(workers_ * engine<T>().nr * u) {}

template <class T>
void Solves<T>::operator()(const T* L, const Panels<T>& Y, T* gain, Panels<T>& left) const {
  const Engine<T>& e = engine<T>();
  const int64_t d = Y.rows, u = Y.k, tile = small_tile<T>();
  left.shape(d, u, e.mr, e.mr * u);
  share(tasks_, workers_, [&](int64_t task, int64_t worker) {
    T* second = second_.get() + worker * e.nr * u;
    const int64_t first = task * tile, last = std::min(first + tile, d);
    for (int64_t row = first; row < last; row += e.nr) {
      e.solve_lower(Y.panel(row / e.nr), L, u, u);
      e.unpack_right(gain + row * u, u, Y.panel(row / e.nr), std::min(e.nr, d - row), u);
    }
    e.pack_left(left.panel(first / e.mr), left.stride, gain + first * u, last - first, u, u, 1);
    for (int64_t row = first; row < last; row += e.nr) {
      std::memcpy(second, Y.panel(row / e.nr), static_cast<size_t>(e.nr * u) * sizeof(T));
      e.solve_upper(second, L, u, u);
      e.unpack_right(gain + row * u, u, second, std::min(e.nr, d - row), u);
    }
  });
}

template <class T>
void unpack(const Panels<T>& Y, T* out) {
  const Engine<T>& e = engine<T>();
  for_each_task(Y.count(), [&](int64_t i) {
    e.unpack_right(out + i * e.nr * Y.k, Y.k, Y.panel(i), std::min(e.nr, Y.rows - i * e.nr), Y.k);
  });
}

template <class T>
void fill_nan(T* data, int64_t count) {
  std::fill(data, data + count, std::numeric_limits<T>::quiet_NaN());
}

#define RLSEDIT_INSTANTIATE(T)                                  \
  template class Factor<T>;                                     \
  template class Solves<T>;                                     \
  template void solve_gain(const T*, const Panels<T>&, T*, T*); \
  template void unpack(const Panels<T>&, T*);                   \
  template void fill_nan(T*, int64_t);
RLSEDIT_INSTANTIATE(float)
RLSEDIT_INSTANTIATE(double)
#undef RLSEDIT_INSTANTIATE

}  // namespace rlsedit
