// From torch's tensors to matrices: checks, batch dimensions, dtype.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

#include "matrix.h"

namespace rlsedit {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

std::string describe(const Tensor& t);  // "(2, 8, 4000)"

// Every argument: on the CPU, of the first argument's dtype (float32 or float64), at least a matrix.
void check_floating(const char* op, const char* name, const Tensor& t);
void check_alike(const char* op, const char* name, const Tensor& t, const char* first_name,
                 const Tensor& first);
void check_square(const char* op, const char* name, const Tensor& t);
// t must be (*batch of `first`, rows, columns), -1 meaning any positive number.
void check_shape(const char* op, const char* name, const Tensor& t, const Tensor& first, int64_t rows,
                 int64_t columns);
// No two indices may address the same element of a tensor that is written in place.
void check_writable(const char* op, const char* name, const Tensor& t);

inline int64_t rows(const Tensor& t) {
  return t.size(t.dim() - 2);
}
inline int64_t columns(const Tensor& t) {
  return t.size(t.dim() - 1);
}

// The matrices of a tensor, numbered over its leading dimensions.
int64_t batch_count(const Tensor& t);
int64_t batch_offset(const Tensor& t, int64_t b);

template <class T>
Matrix<T> matrix(const Tensor& t, int64_t b) {
  T* data = static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
  return {data + batch_offset(t, b), t.stride(t.dim() - 2), t.stride(t.dim() - 1)};
}

// Contiguous, uninitialised: the leading dimensions of `like`, then `last`.
Tensor new_output(const Tensor& like, const Sizes& last);
Tensor new_info(const Tensor& like);

// Run f with a value of the tensor's element type.
template <class F>
void for_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == torch::headeronly::ScalarType::Double)
    f(double{});
  else
    f(float{});
}

}  // namespace rlsedit
