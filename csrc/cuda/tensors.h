// From torch's tensors to what kernels take: checks, matrices, workspace, stream, precision.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "matrices.h"
#include "mma.h"

#ifdef RLSEDIT_EMULATE
#define RLSEDIT_DISPATCH_KEY CPU
#else
#define RLSEDIT_DISPATCH_KEY CUDA
#endif

namespace rlsedit {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline int64_t rows(const Tensor& t) {
  return t.size(t.dim() - 2);
}
inline int64_t columns(const Tensor& t) {
  return t.size(t.dim() - 1);
}

// Arguments of an op; every check raises RuntimeError and names the op and the argument. Python checks before
// and says more: these keep a call past it from touching memory that is not there.
class __attribute__((visibility("hidden"))) Call {
 public:
  // Checks `first`, makes its device the current one until the end of the call, and takes torch's stream
  // there.
  Call(const char* op, const char* name, const Tensor& first);

  void floating(const char* name, const Tensor& t) const;  // dtype and device of the first argument
  void square(const char* name, const Tensor& t) const;
  // t is (leading dimensions of the first argument, rows, columns), -1 meaning any positive number.
  void shape(const char* name, const Tensor& t, int64_t rows, int64_t columns) const;
  void writable(const char* name, const Tensor& t) const;
  void require(bool good, const char* what) const;

  int64_t batch() const;
  Tensor empty(const Sizes& last) const;  // contiguous, after the leading dimensions of the first argument
  Tensor info() const;                    // int32

  // Elements of the first argument's type, from torch's caching allocator, for the rest of the call.
  template <class T>
  T* scratch(int64_t count) {
    kept_.push_back(torch::stable::new_empty(first_, {&count, 1}));
    return static_cast<T*>(kept_.back().mutable_data_ptr());
  }

  template <class T>
  Matrices<T> matrices(const Tensor& t) const {
    Matrices<T> result{static_cast<T*>(const_cast<void*>(t.const_data_ptr())),
                       t.stride(t.dim() - 2),
                       t.stride(t.dim() - 1),
                       0,
                       {0},
                       {0}};
    lead(t, result.dims, result.sizes, result.strides);
    return result;
  }

  Stream stream() const { return stream_; }
  // Buffers for a tile of a product: three where they fit, else two (99 KiB on sm_86 and sm_89).
  int stages(size_t buffer) const { return static_cast<int64_t>(3 * buffer) <= most_shared() ? 3 : 2; }
  int64_t most_shared() const;  // bytes of shared memory that a block may have
  int64_t processors() const;   // multiprocessors of the device
  bool has_warpgroups() const;  // wgmma: the device is Hopper's, and the library was built for sm_90a
  bool is_double() const { return first_.scalar_type() == torch::headeronly::ScalarType::Double; }

 private:
  void lead(const Tensor& t, int& dims, int64_t* sizes, int64_t* strides) const;

  const char* op_;
  Tensor first_;
#ifndef RLSEDIT_EMULATE
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_;
  std::vector<Tensor> kept_;
};

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// How products of float32 are formed: the argument `precision` of every op.
constexpr int64_t kTf32x3 = 0, kIeee = 1;

// f(E()) with the engine for the dtype and the precision asked for.
template <class F>
void with_engine(const Call& call, int64_t precision, const F& f) {
  call.require(precision == kTf32x3 || precision == kIeee, "precision must be 0 (tf32x3) or 1 (ieee)");
  if (call.is_double())
    f(Dmma());
  else if (precision == kIeee)
    f(Ffma());
  else
    f(Tf32x3());
}

}  // namespace rlsedit

#define RLSEDIT_IMPL(op)                                                     \
  STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cuda, RLSEDIT_DISPATCH_KEY, m) { \
    m.impl(#op, TORCH_BOX(&rlsedit::op));                                    \
  }
