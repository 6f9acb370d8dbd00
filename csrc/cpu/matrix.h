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

// A packed operand (see engine.h): `rows` x `k` in panels of `width` rows, `stride` apart. The memory is
// taken once, for whatever is packed into it: an op that writes in place takes all of it before it writes.
template <class T>
struct Panels {
  explicit Panels(int64_t elements) : memory(elements) {}
  void shape(int64_t new_rows, int64_t new_k, int64_t new_width, int64_t new_stride) {
    rows = new_rows, k = new_k, width = new_width, stride = new_stride;
  }
  int64_t count() const { return (rows + width - 1) / width; }
  T* panel(int64_t i) const { return memory.get() + i * stride; }

  int64_t rows = 0, k = 0, width = 1, stride = 0;
  Scratch<T> memory;
};

}  // namespace rlsedit
