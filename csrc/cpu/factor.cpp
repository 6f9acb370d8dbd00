#include "factor.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "parallel.h"
#include "products.h"

namespace rlsedit {

// Right-looking: factor a diagonal block, solve for the panel below, downdate what remains.
template <class T>
int64_t factor(T* A, int64_t u) {
  const Engine<T>& e = engine<T>();
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
    Panels<T> right = pack_right(panel, below, n);
    for_each_task(right.count(), [&](int64_t i) {
      e.solve_lower(right.panel(i), diagonal, u, n);
      e.unpack_right(diagonal + (n + i * e.nr) * u, u, right.panel(i), std::min(e.nr, below - i * e.nr), n);
    });
    const Panels<T> left = pack_left(panel, below, n);
    lower_product(left, right, T(-1), T(1), Matrix<T>{A + (j + n) * u + j + n, u, 1}, false, small_tile<T>());
  }
  for (int64_t i = 0; i < u; ++i) std::fill(A + i * u + i + 1, A + (i + 1) * u, T(0));
  return info;
}

// A task takes rows that are whole right and whole left panels.
template <class T>
void solve_gain(const T* L, Panels<T>& Y, T* gain, T* Z, Panels<T>* left) {
  const Engine<T>& e = engine<T>();
  const int64_t d = Y.rows, u = Y.k, tile = small_tile<T>(), step = tile / e.nr;
  for_each_task((Y.count() + step - 1) / step, [&](int64_t task) {
    const Scratch<T> second(e.nr * u);
    const Scratch<T> rows(left != nullptr ? tile * u : 0);
    const int64_t row0 = task * tile, count = std::min(tile, d - row0);
    for (int64_t r = 0; r < count; r += e.nr) {
      const int64_t row = row0 + r, n = std::min(e.nr, d - row);
      T* panel = Y.panel(row / e.nr);
      e.solve_lower(panel, L, u, u);
      if (Z != nullptr) e.unpack_right(Z + row * u, u, panel, n, u);
      if (left != nullptr) e.unpack_right(rows.get() + r * u, u, panel, n, u);
      std::memcpy(second.get(), panel, static_cast<size_t>(e.nr * u) * sizeof(T));
      e.solve_upper(second.get(), L, u, u);
      e.unpack_right(gain + row * u, u, second.get(), n, u);
    }
    if (left != nullptr) e.pack_left(left->panel(row0 / e.mr), left->stride, rows.get(), count, u, u, 1);
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

#define RLSEDIT_INSTANTIATE(T)                                        \
  template int64_t factor(T*, int64_t);                               \
  template void solve_gain(const T*, Panels<T>&, T*, T*, Panels<T>*); \
  template void unpack(const Panels<T>&, T*);                         \
  template void fill_nan(T*, int64_t);
RLSEDIT_INSTANTIATE(float)
RLSEDIT_INSTANTIATE(double)
#undef RLSEDIT_INSTANTIATE

}  // namespace rlsedit
