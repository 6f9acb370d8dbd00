// Matrices as the kernels see them, and scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace rlsedit {

// One matrix of any strides (in elements).
template <class T>
struct Matrix {
  T* data;
  int64_t rs, cs;

  T* at(int64_t i, int64_t j) const { return data + i * rs + j * cs; }
  Matrix transposed() const { return {data, cs, rs}; }
};

// A symmetric matrix may be read and written through either index; adjacent columns are what the kernels
// like.
template <class T>
Matrix<T> by_rows(Matrix<T> symmetric) {
  return symmetric.cs != 1 && symmetric.rs == 1 ? symmetric.transposed() : symmetric;
}

// Uninitialised memory on a cache line boundary.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, static_cast<size_t>(count) * sizeof(T)) != 0) throw std::bad_alloc();
    data_.reset(static_cast<T*>(p));
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// A packed operand (see engine.h): `rows` x `k` in panels of `width` rows, `stride` apart.
template <class T>
struct Panels {
  Panels(int64_t rows, int64_t k, int64_t width, int64_t stride)
      : rows(rows), k(k), width(width), stride(stride), memory(count() * stride) {}
  int64_t count() const { return (rows + width - 1) / width; }
  T* panel(int64_t i) const { return memory.get() + i * stride; }

  int64_t rows, k, width, stride;
  Scratch<T> memory;
};

}  // namespace rlsedit
