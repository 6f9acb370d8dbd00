#include "products.h"

#include <algorithm>

#include "parallel.h"

namespace rlsedit {
namespace {

constexpr int64_t kPastCache = 32 << 20;  // bytes of a matrix that no cache keeps until its next use

template <class T>
using Pack = void (*)(T*, int64_t, const T*, int64_t, int64_t, int64_t, int64_t);

template <class T>
void pack(Pack<T> kernel, int64_t width, Matrix<const T> A, int64_t rows, int64_t k, Panels<T>& panels) {
  panels.shape(rows, k, width, width * k);
  const int64_t step = 16;  // panels per task
  for_each_task((panels.count() + step - 1) / step, [&](int64_t task) {
    const int64_t first = task * step, row = first * width;
    kernel(panels.panel(first), panels.stride, A.at(row, 0), std::min(step * width, rows - row), k, A.rs,
           A.cs);
  });
}

// The columns of A that come next, asked for a few lines at a time while the ones before are multiplied: too
// many at once would wait for each other.
template <class T>
class Ahead {
 public:
  // Rows [row, row + rows) and columns [column, column + count), in `times` portions.
  Ahead(Matrix<const T> A, int64_t row, int64_t rows, int64_t column, int64_t count, int64_t times) {
    if (A.cs == 1) {
      at_ = A.at(row, column), stride_ = A.rs, across_ = rows, along_ = count;
    } else if (A.rs == 1) {
      at_ = A.at(row, column), stride_ = A.cs, across_ = count, along_ = rows;
    }
    const int64_t lines = across_ * ((along_ + kLine - 1) / kLine);
    each_ = (lines + times - 1) / std::max<int64_t>(1, times);
  }
  void some() {
    for (int64_t i = 0; i < each_ && across_ > 0; ++i) {
      __builtin_prefetch(at_ + place_, 0, 2);
      if ((place_ += kLine) < along_) continue;
      place_ = 0;
      at_ += stride_;
      --across_;
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  const T* at_ = nullptr;
  int64_t stride_ = 0, across_ = 0, along_ = 0, each_ = 0, place_ = 0;
};

// Y = A K', K (u x d) in rows of adjacent elements.
template <class T>
void times_few_keys(Matrix<const T> A, int64_t d, int64_t u, const T* K, const Panels<T>& Y) {
  const Engine<T>& e = engine<T>();
  for_each_task(Y.count(), [&](int64_t i) {
    T* y = Y.panel(i);
    const int64_t row = i * e.nr, rows = std::min(e.nr, Y.rows - row);
    if (rows < e.nr) std::fill(y, y + e.nr * u, T(0));
    e.dots(A.at(row, 0), A.rs, rows, K, d, u, d, y, e.nr);
  });
}

}  // namespace

template <class T>
void pack_left(Matrix<const T> A, int64_t rows, int64_t k, Panels<T>& to) {
  pack<T>(engine<T>().pack_left, engine<T>().mr, A, rows, k, to);
}

template <class T>
void pack_right(Matrix<const T> A, int64_t rows, int64_t k, Panels<T>& to) {
  pack<T>(engine<T>().pack_right, engine<T>().nr, A, rows, k, to);
}

template <class T>
KeyProducts<T>::KeyProducts(int64_t u, int64_t d, int64_t n)
    : u(u),
      d(d),
      n(n),
      keys(std::max(left_size<T>(u, d), operand_size<T>(d, u))),
      Y(right_size<T>(n, left_size<T>(u, 1))),  // padded to whole left panels
      turned(std::max(right_size<T>(u, n), operand_size<T>(n, u))),
      rows(u <= engine<T>().few ? u * d : 0) {}

template <class T>
void KeyProducts<T>::pack(Matrix<const T> K) {
  pack_left(K, u, d, keys);
}

// Y' = K A': the keys are the left operand, rows of A are packed on the fly, so that A is read only once. A
// group of panels shares each block of keys while that is in the cache.
template <class T>
void KeyProducts<T>::multiply(Matrix<const T> A) {
  const Engine<T>& e = engine<T>();
  constexpr int64_t kGroup = 4;      // panels of A packed together
  constexpr int64_t kKeyRows = 192;  // keys per block: with kGroup panels, half of the second-level cache
  const int64_t step = 2 * e.mr;     // keys between two looks ahead
  Y.shape(n, u, e.nr, e.nr * keys.count() * e.mr);
  if (u <= e.few && A.cs == 1) {
    for (int64_t c = 0; c < u; ++c) {
      const T* from = keys.panel(c / e.mr) + c % e.mr;
      for (int64_t k = 0; k < d; ++k) rows.get()[c * d + k] = from[k * e.mr];
    }
    return times_few_keys(A, d, u, static_cast<const T*>(rows.get()), Y);
  }
  for_each_task((Y.count() + kGroup - 1) / kGroup, [&](int64_t task) {
    alignas(64) T packed[kGroup * kBlockBytes / sizeof(T)];
    const int64_t first = task * kGroup, row = first * e.nr;
    const int64_t count = std::min(kGroup * e.nr, n - row), panels = (count + e.nr - 1) / e.nr;
    for (int64_t k0 = 0; k0 < d; k0 += e.kc) {
      const int64_t kb = std::min(e.kc, d - k0);
      e.pack_right(packed, e.nr * e.kc, A.at(row, k0), count, kb, A.rs, A.cs);
      Ahead<T> ahead(A, row, count, k0 + kb, std::min(e.kc, d - k0 - kb), panels * ((keys.count() + 1) / 2));
      for (int64_t u0 = 0; u0 < u; u0 += kKeyRows) {
        const int64_t m = std::min(kKeyRows, (keys.count() * e.mr) - u0);
        for (int64_t q = 0; q < panels; ++q) {
          // The padding of keys and of A is zero, so whole blocks can be computed.
          for (int64_t v0 = 0; v0 < m; v0 += step) {
            ahead.some();
            e.tile({keys.panel((u0 + v0) / e.mr) + k0 * e.mr, keys.stride, packed + q * e.nr * e.kc, 0,
                    std::min(step, m - v0), e.nr, kb, T(1), T(k0 == 0 ? 0 : 1),
                    Y.panel(first + q) + (u0 + v0) * e.nr, e.nr, 1, false, nullptr});
          }
        }
      }
    }
  });
}

template <class T>
void KeyProducts<T>::gram(Matrix<T> G) {
  const Engine<T>& e = engine<T>();
  turned.shape(u, d, e.nr, e.nr * d);  // Y' as a right operand: transpose each panel of Y
  for_each_task(Y.count(), [&](int64_t i) {
    const int64_t k0 = i * e.nr, kb = std::min(e.nr, d - k0);
    e.pack_right(turned.panel(0) + k0 * e.nr, turned.stride, Y.panel(i), u, kb, e.nr, 1);
  });
  lower_product(keys, turned, T(1), T(0), G, true, u > 4 * kTile ? kTile : small_tile<T>());
}

template <class T>
void lower_product(const Panels<T>& A, const Panels<T>& B, T alpha, T beta, Matrix<T> C, bool mirrored,
                   int64_t tile) {
  const Engine<T>& e = engine<T>();
  const int64_t m = A.rows, blocks = (m + tile - 1) / tile;
  const bool past_cache = mirrored && m * m * static_cast<int64_t>(sizeof(T)) > kPastCache;
  for_each_task(blocks * (blocks + 1) / 2, [&](int64_t task) {
    int64_t I = 0, J = task;  // task = I (I + 1) / 2 + J
    while (J > I) J -= ++I;
    const int64_t i0 = I * tile, i1 = std::min(m, i0 + tile), j0 = J * tile, j1 = std::min(m, j0 + tile);
    const bool diagonal = I == J;
    e.tile({A.panel(i0 / e.mr), A.stride, B.panel(j0 / e.nr), B.stride, i1 - i0, j1 - j0, A.k, alpha, beta,
            C.at(i0, j0), C.rs, C.cs, diagonal, mirrored && !diagonal ? C.at(j0, i0) : nullptr, past_cache});
    if (mirrored && diagonal) e.mirror(C.at(i0, i0), C.rs, C.cs, i1 - i0);
  });
}

#define RLSEDIT_INSTANTIATE(T)                                             \
  template void pack_left(Matrix<const T>, int64_t, int64_t, Panels<T>&);  \
  template void pack_right(Matrix<const T>, int64_t, int64_t, Panels<T>&); \
  template struct KeyProducts<T>;                                          \
  template void lower_product(const Panels<T>&, const Panels<T>&, T, T, Matrix<T>, bool, int64_t);
RLSEDIT_INSTANTIATE(float)
RLSEDIT_INSTANTIATE(double)
#undef RLSEDIT_INSTANTIATE

}  // namespace rlsedit
