// Matrices of any strides, with any leading dimensions, as kernels see them.
#pragma once

#include "port.h"

namespace rlsedit {

constexpr int kBatchDims = 4;  // leading dimensions that are left after adjacent ones have been joined

// One matrix; strides in elements.
template <class T>
struct Matrix {
  T* data;
  int64_t rs, cs;

  RLSEDIT_HOST_DEVICE T& at(int64_t i, int64_t j) const { return data[i * rs + j * cs]; }
};

// All matrices of a tensor, numbered over its leading dimensions.
template <class T>
struct Matrices {
  T* data;
  int64_t rs, cs;
  int dims;
  int64_t sizes[kBatchDims], strides[kBatchDims];

  RLSEDIT_HOST_DEVICE Matrix<T> operator[](int64_t b) const {
    int64_t offset = 0;
#pragma unroll  // indices known to the compiler: the arrays stay where kernel arguments lie
    for (int i = kBatchDims - 1; i > 0; --i)
      if (i < dims) {
        offset += b % sizes[i] * strides[i];
        b /= sizes[i];
      }
    if (dims > 0) offset += b * strides[0];
    return {data + offset, rs, cs};
  }
};

// Contiguous matrices (count, rows, columns).
template <class T>
Matrices<T> stacked(T* data, int64_t rows, int64_t columns) {
  return {data, columns, 1, 1, {0}, {rows * columns}};
}

// A symmetric matrix may be read and written through either index; the kernels like adjacent columns.
template <class T>
Matrices<T> by_rows(Matrices<T> symmetric) {
  if (symmetric.cs != 1 && symmetric.rs == 1) {
    symmetric.rs = symmetric.cs;
    symmetric.cs = 1;
  }
  return symmetric;
}

// Whether 16 bytes at a time can be read along the second index, from any row.
template <class T>
RLSEDIT_DEVICE bool wide(const Matrix<T>& A) {
  return A.cs == 1 && A.rs % static_cast<int64_t>(16 / sizeof(T)) == 0 &&
         reinterpret_cast<uintptr_t>(A.data) % 16 == 0;
}

}  // namespace rlsedit
