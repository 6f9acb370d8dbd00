// Adjacent elements of global memory by one request: half as many of them, or a quarter, and whole sectors.
#pragma once

#include "matrices.h"

namespace rlsedit {

// Two elements as one, to be loaded.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

// Whether the elements in columns 2 n and 2 n + 1 lie so.
template <class T>
RLSEDIT_DEVICE bool paired(const Matrix<T>& A) {
  return A.cs == 1 && A.rs % 2 == 0 && reinterpret_cast<uintptr_t>(A.data) % (2 * sizeof(T)) == 0;
}

// N elements, of 16 bytes at most, to a multiple of their size. The compiler may take the store of a struct
// apart, so the instruction is given.
template <int N, class T>
RLSEDIT_DEVICE void store_adjacent(T* to, const T (&x)[N]) {
  static_assert(N == 2 || (N == 4 && sizeof(T) == 4), "16 bytes at most");
#ifdef RLSEDIT_EMULATE
  if (reinterpret_cast<uintptr_t>(to) % sizeof x != 0) emulate::Machine::here().fail("a misaligned store");
  std::memcpy(to, x, sizeof x);
#else
  const size_t place = __cvta_generic_to_global(to);
  if constexpr (sizeof(T) == 8)
    asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(place), "d"(x[0]), "d"(x[1]) : "memory");
  else if constexpr (N == 2)
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(place), "f"(x[0]), "f"(x[1]) : "memory");
  else
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(place), "f"(x[0]), "f"(x[1]), "f"(x[2]),
                 "f"(x[3])
                 : "memory");
#endif
}

// to[row][column] <- x, to[row][column + 1] <- y where they lie inside of a contiguous matrix that begins at
// a multiple of 16 bytes; `column` is even.
template <class T>
RLSEDIT_DEVICE void put_pair(T* to, int64_t row, int64_t column, int64_t rows, int64_t columns, T x, T y) {
  if (row >= rows || column >= columns) return;
  T* const at = to + row * columns + column;
  if (columns % 2 == 0) {  // so that y is inside, and every row begins at a multiple of two elements
    store_adjacent(at, {x, y});
    return;
  }
  at[0] = x;
  if (column + 1 < columns) at[1] = y;
}

}  // namespace rlsedit
